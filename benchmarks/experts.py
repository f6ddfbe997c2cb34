"""Layers with experts: every known form, the dispatcher's choice and the published form, against the base layer alone.

    python -m benchmarks.experts [--only TEXT] [--repeats N] [--threads N] [--clock wall|cpu] [--networks]

Variants take turns within one run; what is printed is the ratio of medians to the base layer (base network) without experts.
With ``--clock cpu --threads 1`` the numbers hold on a machine that other work shares.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlore.layers import experts as expert_module
from medlore.layers.dispatch import choose_form
from medlore.layers.experts import ExpertLayer, expert_layer
from medlore.layers.routing import route

RANK = 8
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Shape:
    """A convolution and its batch."""

    inputs: int
    outputs: int
    kernel: int
    space: tuple[int, ...]
    batch: int
    present: int
    experts: int

    @property
    def name(self) -> str:
        """What it is called in a row."""
        space = "x".join(map(str, self.space))
        return f"{len(self.space)}D {self.inputs}->{self.outputs} k{self.kernel} {space} b{self.batch}, {self.present} of {self.experts}"

    def layer(self, layout: str) -> ExpertLayer:
        """The layer, with factors that are not zero."""
        torch.manual_seed(0)
        plain = (nn.Conv2d if len(self.space) == 2 else nn.Conv3d)(
            self.inputs, self.outputs, self.kernel, padding=self.kernel // 2, bias=False
        )
        layer = expert_layer(plain, ranks={f"e{i}": RANK for i in range(self.experts)}, layout=layout)
        for factor in layer.lora_B.values():
            nn.init.normal_(factor, std=0.05)
        return layer

    def names(self) -> list[str]:
        """A mixed batch in random order, in which every expert that is present has a sample."""
        generator = torch.Generator().manual_seed(1)
        extra = torch.randint(self.present, (self.batch - self.present,), generator=generator)
        order = torch.randperm(self.batch, generator=generator)
        return [f"e{i}" for i in torch.cat([torch.arange(self.present), extra])[order].tolist()]


SHAPES = [
    Shape(58, 58, 1, (28, 28), 32, 11, 11),
    Shape(64, 64, 3, (28, 28), 32, 10, 10),
    Shape(256, 256, 3, (14, 14), 32, 10, 10),
    Shape(464, 464, 1, (7, 7), 32, 10, 10),
    Shape(512, 512, 3, (7, 7), 32, 10, 10),
    Shape(1024, 2048, 1, (7, 7), 32, 10, 10),
    Shape(64, 64, 3, (32, 32, 32), 2, 2, 8),
    Shape(128, 128, 3, (24, 24, 12), 4, 4, 8),
    Shape(256, 256, 3, (12, 12, 6), 4, 4, 8),
    Shape(512, 512, 3, (9, 9, 3), 2, 2, 8),
    Shape(512, 512, 3, (9, 9, 3), 2, 1, 8),
]


def published(layer: ExpertLayer, x: Tensor, names: Sequence[str]) -> Tensor:
    """LoRKD's way, written by us: all kernels, a one-hot sum, one grouped convolution."""
    weight = layer.base_layer.weight
    deltas = torch.stack([layer.delta_weight(name) for name in layer.experts])
    one_hot = torch.tensor([[float(name == known) for known in layer.experts] for name in names])
    kernels = weight + (one_hot.view(*one_hot.shape, *[1] * weight.ndim) * deltas).sum(1)
    convolution = F.conv2d if weight.ndim == 4 else F.conv3d
    y = convolution(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), None, 1, layer.base_layer.padding, 1, len(x))
    return y.view(len(x), -1, *y.shape[2:])


def variants(layer: ExpertLayer, x: Tensor, names: Sequence[str], *, forms: str) -> dict[str, Callable[[], Tensor]]:
    """Name -> one forward pass."""

    def routed(form: str | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            expert_module.choose_form = choose_form if form is None else lambda _job: form  # type: ignore[assignment,return-value]
            with route(layer, names):
                return layer(x)

        return run

    found: dict[str, Callable[[], Tensor]] = {"base": lambda: layer.base_layer(x)}
    if forms == "all":
        found["published"] = lambda: published(layer, x, names)
    if forms != "chosen":
        found |= {form: routed(form) for form in expert_module.FORMS}
    return found | {"chosen": routed(None)}


def timed(
    runs: dict[str, Callable[[], Tensor]], parameters: Sequence[Tensor], *, backward: bool, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each variant; they take turns, the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    slope: Tensor | None = None
    for turn in range(repeats + 1):
        for name, run in runs.items():
            if name == "published" and turn > max(2, repeats // 3):
                continue
            start = clock()
            with nullcontext() if backward else torch.no_grad():
                y = run()
            if backward:
                slope = torch.ones_like(y) if slope is None else slope  # in the first turn, which is not counted
                y.backward(slope)
            if turn:
                seconds[name].append(clock() - start)
            for parameter in parameters:
                parameter.grad = None
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(shape: Shape, layout: str, *, frozen: bool, repeats: int, clock: Callable[[], float], backward: bool, forms: str) -> None:
    """Print one row."""
    layer = shape.layer(layout)
    layer.base_layer.requires_grad_(not frozen)
    x = torch.randn(shape.batch, shape.inputs, *shape.space, requires_grad=True)
    runs = variants(layer, x, shape.names(), forms=forms)
    medians = timed(runs, [x, *layer.parameters()], backward=backward, repeats=repeats, clock=clock)
    base = medians.pop("base")
    known = min((value for name, value in medians.items() if name != "chosen"), default=medians["chosen"])
    row = "  ".join(f"{name} {value / base:5.2f}" for name, value in medians.items())
    what = f"{shape.name}, {layout}{', frozen base' if frozen else ''}, {'f+b' if backward else 'fwd'}"
    print(f"{what:72s} base {base * 1e3:7.1f} ms  {row}  chosen/best {medians['chosen'] / known:.2f}", flush=True)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--layout", choices=["channel", "interleaved"], default=None)
    parser.add_argument("--forms", choices=["all", "ours", "chosen"], default="all", help="ours: without the published form")
    parser.add_argument("--frozen", action="store_true", help="the base does not learn")
    parser.add_argument("--networks", action="store_true", help="whole networks instead of layers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for layout in [options.layout] if options.layout else ["channel", "interleaved"]:
        for shape in SHAPES:
            for backward in (True, False):
                if options.only in shape.name:
                    compare(
                        shape,
                        layout,
                        frozen=options.frozen,
                        repeats=options.repeats,
                        clock=CLOCKS[options.clock],
                        backward=backward,
                        forms=options.forms,
                    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
