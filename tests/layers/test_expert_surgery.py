"""Installing, refusing, merging, removing; batch norms; the state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from medlore.errors import InputError, TargetError, UnknownNameError
from medlore.layers.experts.layer import ExpertConv2d, ExpertConv3d, ExpertLinear
from medlore.layers.experts.norms import ExpertBatchNorm, FrozenBatchNorm
from medlore.layers.experts.routing import route
from medlore.layers.experts.surgery import BatchNormWay, expert_layers, install_experts, merge, remove_experts, set_trainable

NAMES = ["liver", "head and neck", "spine"]


def plain_network(*, norm: bool = True) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8, affine=False, momentum=None) if norm else nn.Identity(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    if norm:
        for _ in range(3):
            net(torch.randn(8, 3, 6, 6) * 2 + 1)
    return net


def with_experts(net: nn.Module, *, batchnorm: BatchNormWay = "freeze", layout: str = "channel") -> nn.Module:
    install_experts(net, experts=NAMES, ranks={"liver": 2, "head and neck": 3, "spine": 1}, alpha=4, batchnorm=batchnorm, layout=layout)  # type: ignore[arg-type]
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return net


def test_a_new_expert_is_the_base() -> None:
    net = plain_network(norm=False)
    x = torch.randn(2, 3, 6, 6)
    wanted = net(x)
    report = install_experts(net, experts=NAMES, ranks=2)
    with route(net, ["liver", "spine"]):
        assert torch.allclose(net(x), wanted, atol=1e-6)
    assert torch.equal(net(x), wanted)
    assert [layer.name for layer in report.layers] == ["0", "3", "7"]
    assert report.expert_parameters["liver"] == 2 * (27 + 8) + 2 * (8 + 8) + 2 * (8 + 4)
    assert report.base_parameters == sum(p.numel() for p in merge(net, None).parameters())
    assert report.as_dict()["layers"][0]["weight_shape"] == (8, 3, 3, 3)


def test_a_refused_installation_leaves_everything_trainable() -> None:
    net = plain_network(norm=False)
    with pytest.raises(InputError, match="finite numbers"):
        install_experts(net, experts=NAMES, ranks=2, alpha=float("nan"), base="frozen")
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(UnknownNameError, match="'frozen'"):
        install_experts(net, experts=NAMES, ranks=2, base="freeze")  # type: ignore[arg-type]


def test_ways_to_say_targets_and_ranks() -> None:
    def installed(**options: object) -> dict[str, dict[str, int]]:
        net = plain_network(norm=False)
        install_experts(net, experts=["a", "b"], **options)  # type: ignore[arg-type]
        return {name: layer.ranks for name, layer in expert_layers(net)}

    assert list(installed(ranks=1, targets=r"[03]")) == ["0", "3"]
    assert list(installed(ranks=1, targets=nn.Linear)) == ["7"]
    assert list(installed(ranks=1, targets=(nn.Linear, nn.Conv2d))) == ["0", "3", "7"]
    assert list(installed(ranks=1, targets=lambda name, module: name == "3")) == ["3"]
    assert installed(ranks={("0", "a"): 2, ("7", "b"): 1}) == {"0": {"a": 2, "b": 0}, "7": {"a": 0, "b": 1}}
    assert installed(ranks=lambda layer, expert: int(layer == "3") * (1 + (expert == "b"))) == {"3": {"a": 1, "b": 2}}


def refused_networks() -> list[tuple[nn.Module, str]]:
    hooked = plain_network(norm=False)
    hooked[0].register_forward_hook(lambda *_: None)
    normed = plain_network(norm=False)
    parametrizations.weight_norm(normed[0])
    return [
        (nn.Sequential(nn.MultiheadAttention(4, 2)), "0.out_proj: NonDynamicallyQuantizableLinear has a forward of its own"),
        (nn.Sequential(nn.TransformerEncoderLayer(4, 2)), "0.linear1: TransformerEncoderLayer reads the weight past"),
        (nn.Sequential(nn.ConvTranspose3d(4, 4, 2)), "0: ConvTranspose3d has a forward of its own"),
        (hooked, "0: it carries hooks"),
        (normed, "0: its weight is parametrized|0: ParametrizedConv2d has a forward of its own"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_layers_that_cannot_have_experts(number: int) -> None:
    net, why = refused_networks()[number]
    before = str(net)
    with pytest.raises(TargetError, match=why):
        install_experts(net, experts=["a"], ranks=1, targets=lambda name, m: hasattr(m, "weight") and getattr(m.weight, "ndim", 0) > 1)
    assert str(net) == before


def test_wrong_arguments_change_nothing() -> None:
    net = plain_network(norm=False)
    before = str(net)
    wrong: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"ranks": 1, "targets": "conv.*"}, TargetError, "'conv.*' meets no layer"),
        ({"ranks": 1, "targets": "("}, InputError, "a regular expression"),
        ({"ranks": {"a": 1}}, TargetError, "'b': no rank"),
        ({"ranks": {"a": 1, "b": 1, "lver": 1}}, TargetError, "no expert 'lver'"),
        ({"ranks": {("8", "a"): 1}}, TargetError, "'8' is no target"),
        ({"ranks": 0}, TargetError, "rank 0 for every layer"),
        ({"ranks": -1}, InputError, "expert 'a': rank -1"),
        ({"ranks": 1, "alpha": 2, "scaling": 1}, InputError, "alpha, scaling: both"),
        ({"ranks": 1, "alpha": {"a": 1}}, InputError, r"no value for \['b'\]"),
        ({"ranks": 1, "alpha": float("nan")}, InputError, "finite"),
        ({"ranks": 1, "layout": "chanel"}, UnknownNameError, "'chanel'"),
        ({"ranks": 1, "batchnorm": "ignore"}, UnknownNameError, "'ignore'"),
    ]
    for options, kind, message in wrong:
        with pytest.raises(kind, match=message):
            install_experts(net, experts=["a", "b"], **options)  # type: ignore[arg-type]
        assert str(net) == before, options
    for experts, message in [(["a", "a"], "different names"), (["a.b"], "hold a dot"), (["keys"], "torch's own words"), ([], "no expert")]:
        with pytest.raises(InputError, match=message):
            install_experts(net, experts=experts, ranks=1)
    install_experts(net, experts=["a"], ranks=1)
    with pytest.raises(InputError, match=r"a network that has experts.*remove_experts"):
        install_experts(net, experts=["a"], ranks=1)


def test_a_shared_layer_is_replaced_everywhere() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    install_experts(net, experts=["a"], ranks=1)
    assert net["first"] is net["second"][0]
    assert isinstance(net["first"], ExpertLinear)


@pytest.mark.parametrize("layout", ["channel", "interleaved"])
@pytest.mark.parametrize("batchnorm", ["freeze", "per-expert"])
def test_merged_is_routed_and_the_base_is_untouched(batchnorm: BatchNormWay, layout: str) -> None:
    net = with_experts(plain_network(), batchnorm=batchnorm, layout=layout)
    for names in (NAMES * 3, ["liver"] * 4):
        with route(net, names):
            net(torch.randn(len(names), 3, 6, 6))
    net.eval()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(4, 3, 6, 6)
    with route(net, [*NAMES, None]):
        y = net(x)
    for i, name in enumerate([*NAMES, None]):
        plain = merge(net, name)
        assert not list(expert_layers(plain))
        assert [type(m) for m in plain.modules()] == [type(m) for m in plain_network().modules()]
        assert torch.allclose(plain(x[i : i + 1]), y[i : i + 1], atol=1e-5)
        for parameter in plain.parameters():
            parameter.data.fill_(7.0)  # nothing of the copy belongs to the network
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_merge_refusals() -> None:
    net = with_experts(plain_network(), batchnorm="per-expert")
    with pytest.raises(UnknownNameError, match=r"'livr'.*the nearest are 'liver'"):
        merge(net, "livr")
    with pytest.raises(InputError, match="expert, mixture: both"):
        merge(net, "liver", mixture={"liver": 1.0})
    with pytest.raises(InputError, match=r"mixture: shape \(2,\)"):
        merge(net, None, mixture=torch.ones(2))
    with pytest.raises(InputError, match="statistics do not mix"):
        merge(net, None, mixture={"liver": 0.5})
    with pytest.raises(InputError, match="1: a mixture of experts"), route(net, torch.ones(2, 3)):
        net(torch.randn(2, 3, 6, 6))


def test_batch_norm_is_refused_with_both_ways_out() -> None:
    net = plain_network()
    with pytest.raises(InputError, match=r"(?s)2 layers couple the samples.*batchnorm='freeze'.*batchnorm='per-expert'.*- 1: BatchNorm2d"):
        install_experts(net, experts=["a"], ranks=1)
    with pytest.raises(InputError, match="0: its statistics were never gathered"):
        install_experts(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), experts=["a"], ranks=1, batchnorm="freeze")
    with pytest.raises(InputError, match="keeps no running statistics"):
        install_experts(
            nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)), experts=["a"], ranks=1, batchnorm="freeze"
        )
    with pytest.raises(InputError, match="SyncBatchNorm gathers over processes"):
        install_experts(nn.Sequential(nn.SyncBatchNorm(3), nn.Linear(3, 2)), experts=["a"], ranks=1, batchnorm="per-expert")


@pytest.mark.parametrize("batchnorm", ["freeze", "per-expert"])
def test_an_expert_learns_from_its_own_samples_alone(batchnorm: BatchNormWay) -> None:
    """In train mode: the loss of one expert's samples does not depend on the other samples, and absent experts get nothing."""
    net = with_experts(plain_network(), batchnorm=batchnorm).train()
    names = ["liver", "head and neck", "liver", "head and neck"]
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    with route(net, names):
        y = net(x)
    y[[0, 2]].square().sum().backward()
    assert x.grad is not None
    assert x.grad[[0, 2]].any()
    assert not x.grad[[1, 3]].any()
    for name, parameter in net.named_parameters():
        if "lora_" in name and not name.endswith("liver"):
            assert parameter.grad is None or not parameter.grad.any(), name
        elif name.endswith("lora_B.liver"):
            assert parameter.grad is not None
            assert parameter.grad.any()


def test_statistics_of_an_expert_are_those_of_its_samples() -> None:
    plain = nn.BatchNorm2d(3, momentum=0.3)
    norm = ExpertBatchNorm(copy.deepcopy(plain), experts=("a", "b")).train()
    x = torch.randn(5, 3, 4, 4) * 3 + 2
    rows = [0, 3, 4]
    with route(norm, ["a", "b", "b", "a", "a"]):
        y = norm(x)
    assert torch.allclose(y[rows], plain(x[rows]), atol=1e-5)
    assert torch.allclose(norm.expert_running_mean[0], plain.running_mean)
    assert torch.allclose(norm.expert_running_var[0], plain.running_var)
    assert not norm.running_mean.any()
    frozen_before = norm.expert_running_mean.clone()
    norm.eval()
    with route(norm, "b"):
        norm(x)
    assert torch.equal(norm.expert_running_mean, frozen_before)
    with pytest.raises(InputError, match=r"one value per channel for 'b'.*two samples of each expert"), route(norm.train(), "b"):
        norm(torch.randn(1, 3, 1, 1))


def test_frozen_norm_keeps_names_and_values() -> None:
    net = plain_network().eval()
    x, keys = torch.randn(2, 3, 6, 6), set(net.state_dict())
    wanted = net(x)
    with_experts(net)
    assert isinstance(net[1], FrozenBatchNorm)
    assert {key.replace(".base_layer.", ".") for key in net.state_dict() if "lora_" not in key} == keys
    assert torch.equal(net.train()(x), wanted)
    remove_experts(net)
    assert type(net[1]) is nn.BatchNorm2d
    assert torch.equal(net.eval()(x), wanted)


def test_state_dict_carries_the_scaling() -> None:
    net = with_experts(plain_network(norm=False))
    other = plain_network(norm=False)
    install_experts(other, experts=NAMES, ranks={"liver": 2, "head and neck": 3, "spine": 1}, scaling=1.0)
    state = net.state_dict()
    other.load_state_dict(state)
    x = torch.randn(3, 3, 6, 6)
    with route(net, NAMES):
        assert torch.equal(net(x), other(x))
    without = {key: value for key, value in state.items() if "lora_scaling" not in key}
    other.load_state_dict(without)  # a published file has none; ours stays
    assert other[0].scaling["liver"] == 2.0
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: value for key, value in state.items() if not key.endswith("lora_A.liver")})


def test_scalings_are_kept_by_name() -> None:
    """Experts in another order, or one more: each still takes its own; a file that lacks one is not whole."""
    base = {"liver": 0.5, "brain": 3.0}
    kept = ExpertLinear(nn.Linear(4, 2), ranks={"liver": 1, "brain": 1}, scaling=base)
    turned = ExpertLinear(nn.Linear(4, 2), ranks={"brain": 1, "liver": 1}, scaling=1.0)
    turned.load_state_dict(kept.state_dict())
    assert turned.scaling == base
    grown = ExpertLinear(nn.Linear(4, 2), ranks={"spine": 1, "liver": 1, "brain": 1}, scaling=1.0)
    missing = grown.load_state_dict(kept.state_dict(), strict=False).missing_keys
    assert grown.scaling == base | {"spine": 1.0}
    assert "lora_scaling.spine" in missing
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_scaling\.spine"):
        kept.load_state_dict(grown.state_dict())


def test_instance_norm_with_shared_statistics_is_found() -> None:
    """Its running mean is gathered from the samples of all experts, and every expert is evaluated with it."""

    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True, affine=True))

    with pytest.raises(InputError, match="couple the samples") as caught:
        install_experts(network(), experts=["a"], ranks=1)
    assert list(caught.value.faults) == ["1: InstanceNorm2d"]
    with pytest.raises(InputError, match="1 norms cannot be replaced") as caught:
        install_experts(network(), experts=["a"], ranks=1, batchnorm="per-expert")
    assert "track_running_stats" in caught.value.faults[0]
    install_experts(nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), experts=["a"], ranks=1)
    net, x = network(), torch.randn(2, 3, 6, 6)
    net(x)
    wanted = net.eval()(x)
    install_experts(net, experts=["a"], ranks=1, batchnorm="freeze")
    assert torch.allclose(net.train()(x), wanted, atol=1e-6)
    plain = merge(net, "a").eval()
    assert type(plain[1]) is nn.InstanceNorm2d
    assert torch.allclose(plain(x), wanted, atol=1e-6)


def test_what_learns() -> None:
    net = plain_network(norm=False)
    install_experts(net, experts=NAMES, ranks=1, base="frozen")
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {n for n, _ in net.named_parameters() if "lora_" in n}
    set_trainable(net, base=True, experts=["spine"])
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert all(name.endswith("spine") for name in learning if "lora_" in name)
    assert "0.base_layer.weight" in learning
    with pytest.raises(UnknownNameError, match="'spin'"):
        set_trainable(net, base=True, experts=["spin"])


def test_factors_can_be_replaced_by_others_of_another_rank() -> None:
    layer = ExpertConv3d(nn.Conv3d(4, 6, 3), ranks={"a": 1, "b": 2})
    layer.set_factors("a", torch.randn(5, 4, 3, 3, 3), torch.randn(6, 5, 1, 1, 1), scaling=0.5)
    assert (layer.ranks["a"], layer.scaling["a"]) == (5, 0.5)
    layer.drop_factors("b")
    assert not layer.delta_weight("b").any()
    assert "b" not in layer.lora_A
    with pytest.raises(InputError, match=r"\(6, 4, 1, 1, 1\).*for rank 5"):
        layer.set_factors("a", torch.randn(5, 4, 3, 3, 3), torch.randn(6, 4, 1, 1, 1), scaling=0.5)
    assert "ranks={'a': 5, 'b': 0}" in repr(layer)


def test_layers_start_with_lora_s_initialisation() -> None:
    layer = ExpertConv2d(nn.Conv2d(16, 8, 3), ranks={"a": 4})
    bound = 1 / (16 * 9) ** 0.5
    assert not layer.lora_B["a"].any()
    assert 0.9 * bound < float(layer.lora_A["a"].detach().abs().max()) <= bound
