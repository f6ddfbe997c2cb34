"""Two processes: experts installed before DistributedDataParallel have their gradients reduced."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medlore.layers.experts.routing import route
from medlore.layers.experts.surgery import install_experts

NAMES = ["a", "b", "c"]
ROUTES = [["a", "b"], ["b", "b"]]  # process 0 and 1; c is nowhere


def network() -> nn.Sequential:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    install_experts(net, experts=NAMES, ranks=2)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return net


def images() -> torch.Tensor:
    return torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(9))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    net = DistributedDataParallel(network(), find_unused_parameters=True)
    with route(net, ROUTES[rank]):
        y = net(images()[2 * rank : 2 * rank + 2])
    y.square().mean().backward()
    grads = {name: p.grad for name, p in net.module.named_parameters() if p.grad is not None}
    torch.save(grads, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_reduced(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    net = network()
    with route(net, ROUTES[0] + ROUTES[1]):
        y = net(images())
    y.square().mean().backward()
    for name, parameter in net.named_parameters():
        if name.endswith(".c"):
            assert parameter.grad is None
            assert all(name not in grads or not grads[name].any() for grads in (first, second))
            continue
        assert torch.equal(first[name], second[name]), name
        assert parameter.grad is not None
        assert torch.allclose(first[name], parameter.grad, atol=1e-6), name
