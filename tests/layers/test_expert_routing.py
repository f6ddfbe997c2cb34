"""The route: who goes where, threads, autocast, activation checkpointing."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medlore.errors import InputError, StepError, TargetError, UnknownNameError
from medlore.layers.experts.routing import active_route, roster_of, route, route_contexts
from medlore.layers.experts.surgery import install_experts, merge

NAMES = ["abdomen", "brain", "spine"]


def network() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 1), nn.GELU(), nn.Flatten(), nn.Linear(8 * 25, 4)
    )
    install_experts(net, experts=NAMES, ranks={"abdomen": 2, "brain": 3, "spine": 1})
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return net


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 5, 5)


def test_every_way_to_say_it() -> None:
    net, x = network(), images(3)
    with route(net, ["spine", None, "abdomen"]):
        wanted = net(x)
    for same in (torch.tensor([2, -1, 0]), torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]])):
        with route(net, same):
            assert torch.allclose(net(x), wanted, atol=1e-6)
    with route(net, "brain"):
        for count in (1, 3):
            assert torch.allclose(net(x[:count]), merge(net, "brain")(x[:count]), atol=1e-6)
    assert torch.equal(net(x), merge(net, None)(x))
    assert roster_of(nn.DataParallel(net)) == tuple(NAMES)


def test_mixture_is_the_merged_mixture_and_its_weights_learn() -> None:
    net, x = network(), images(4)
    weights = torch.rand(4, 3, requires_grad=True)
    with route(net, weights):
        y = net(x)
    for sample in range(4):
        assert torch.allclose(y[sample : sample + 1], merge(net, None, mixture=weights[sample].detach())(x[sample : sample + 1]), atol=1e-5)
    y.square().sum().backward()
    assert weights.grad is not None
    assert (weights.grad != 0).all()


def test_blocks_nest_and_leave_nothing_behind() -> None:
    net, x = network(), images(2)
    with route(net, "abdomen"):
        outer = net(x)
        with route(net, "brain"):
            assert not torch.allclose(net(x), outer)
        assert torch.equal(net(x), outer)
        with pytest.raises(ZeroDivisionError), route(net, "spine"):
            _ = 1 / 0
        assert torch.equal(net(x), outer)
    assert active_route(roster_of(net)) is None


def test_threads_do_not_see_each_other() -> None:
    net, x = network().eval(), images(2)
    wanted = {name: merge(net, name)(x) for name in NAMES}
    wrong: list[str] = []
    barrier = threading.Barrier(len(NAMES))

    def work(name: str) -> None:
        with torch.no_grad(), route(net, name):
            barrier.wait()
            wrong.extend(name for _ in range(20) if not torch.allclose(net(x), wanted[name], atol=1e-5))

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrong_routes_say_so() -> None:
    net = network()
    with pytest.raises(UnknownNameError, match=r"'abdomne'.*3 names; the nearest are 'abdomen'"), route(net, ["abdomne"]):
        pass
    with pytest.raises(InputError, match=r"0: a batch of 3 samples under a route of 2"), route(net, ["brain", "spine"]):
        net(images(3))
    with pytest.raises(InputError, match=r"indices \[-2, 3\].*-1 \(shared base\) to 2 \('spine'\)"), route(net, torch.tensor([0, 3, -2])):
        pass
    with pytest.raises(InputError, match=r"mixture weights of shape \(2, 2\).*\(b, 3\)"), route(net, torch.ones(2, 2)):
        pass
    with pytest.raises(InputError, match=r"shape \(2, 2\).*one index for each sample"), route(net, torch.ones(2, 2, dtype=torch.long)):
        pass
    with pytest.raises(InputError, match="an empty list"), route(net, []):
        pass
    with pytest.raises(TargetError, match=r"Linear without expert layers.*install_experts"), route(nn.Linear(2, 2), "brain"):
        pass


@pytest.mark.parametrize("names", [["brain", "abdomen", None], ["spine"] * 3])
def test_autocast(names: list[str | None]) -> None:
    net, x = network(), images(3)
    with route(net, names):
        exact = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - exact).detach().abs().max()) < 0.03 * float(exact.detach().abs().max())
    y.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool, contexts: bool = False) -> None:
        super().__init__()
        self.body = network()
        self.options = {"use_reentrant": reentrant} | ({"context_fn": route_contexts} if contexts else {})

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, **self.options)  # type: ignore[no-any-return]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("body."): p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_keep_their_route(*, reentrant: bool) -> None:
    net = Checkpointed(reentrant=reentrant)
    plain = copy.deepcopy(net.body)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.0)
    for names in (["brain", "abdomen", None], ["spine", "spine", "brain"]):
        x = images(3).requires_grad_()
        for model in (net, plain):
            model.zero_grad(set_to_none=True)
            with route(model, names):
                y = model(x)
            y.square().sum().backward()  # the route is over
        found, wanted = gradients(net), gradients(plain)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
        optimiser.step()


def test_two_routes_before_one_backward() -> None:
    """Never a wrong gradient: refused, unless the route is carried by the checkpoint itself."""
    x = images(2)

    def loss(net: nn.Module) -> Tensor:
        with route(net, ["brain", "abdomen"]):
            first = net(x).square().sum()
        with route(net, "spine"):
            return first + net(x).square().sum()

    with pytest.raises(StepError, match=r"0: a checkpointed block runs again.*context_fn=route_contexts"):
        loss(Checkpointed(reentrant=False)).backward()
    net = Checkpointed(reentrant=False, contexts=True)
    plain = copy.deepcopy(net.body)
    loss(net).backward()
    loss(plain).backward()
    assert all(torch.allclose(gradients(net)[name], grad, atol=1e-6) for name, grad in gradients(plain).items())


def test_forward_passes_before_a_step_are_forgotten() -> None:
    net = Checkpointed(reentrant=False)
    with route(net, "spine"):
        net(images(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.0)
    with route(net, "brain"):
        y = net(images(2))
    y.sum().backward()
    assert net.body[0].lora_B["brain"].grad is not None
    assert net.body[0].lora_B["spine"].grad is None


def test_copies_and_pickles_carry_no_route() -> None:
    net, x = network(), images(2)
    with route(net, torch.rand(2, 3, requires_grad=True)):
        net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))


def test_odd_inputs() -> None:
    net = network()
    with route(net, "brain"):
        assert tuple(net[0](images(0)).shape) == (0, 8, 5, 5)
        assert tuple(net[0](images(1)[0]).shape) == (8, 5, 5)
        assert tuple(net[6](torch.zeros(200)).shape) == (4,)
