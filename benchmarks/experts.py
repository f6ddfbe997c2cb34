"""Layers with experts: every known form, the dispatcher's choice and the published form, against the base layer alone.

    python -m benchmarks.experts [--only TEXT] [--repeats N] [--threads N] [--clock wall|cpu] [--networks | --memory]
    python -m benchmarks.experts --all --json docs/results/experts.json --page docs/performance.md      every row, about ten minutes
    python -m benchmarks.experts --refit --json docs/results/experts.json                           constants of layers/dispatch.py

Variants take turns within one run; what is printed is the ratio of medians to the base layer (base network) without experts.
With ``--clock cpu --threads 1`` the numbers hold on a machine that other work shares.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlore.files import read_json, write_json
from medlore.layers.experts import layer as expert_module
from medlore.layers.experts.call import LayerCall
from medlore.layers.experts.dispatch import Form, choose_form, load_of
from medlore.layers.experts.layer import ExpertLayer, expert_layer
from medlore.layers.experts.routing import route
from medlore.layers.experts.surgery import install_experts
from medlore.runs.report import describe_machine

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


PUBLISHED = [SHAPES[0], SHAPES[1], SHAPES[4], SHAPES[9]]  # shapes whose published form is timed: it takes seconds on the others


def published(layer: ExpertLayer, x: Tensor, names: Sequence[str]) -> Tensor:
    """LoRKD's way, written by us: all kernels, a one-hot sum, one grouped convolution."""
    weight = layer.base_layer.weight
    deltas = torch.stack([layer.delta_weight(name) for name in layer.experts])
    one_hot = torch.tensor([[float(name == known) for known in layer.experts] for name in names])
    kernels = weight + (one_hot.view(*one_hot.shape, *[1] * weight.ndim) * deltas).sum(1)
    convolution = F.conv2d if weight.ndim == 4 else F.conv3d
    y = convolution(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), None, 1, layer.base_layer.padding, 1, len(x))
    return y.view(len(x), -1, *y.shape[2:])


def variants(
    layer: ExpertLayer, x: Tensor, names: Sequence[str], *, forms: str, noted: dict[str, Any] | None = None
) -> dict[str, Callable[[], Tensor]]:
    """Name -> one forward pass; what the cost model saw and chose is put into `noted`."""

    def note(job: LayerCall) -> Form:
        chosen = choose_form(job)
        if noted is not None:
            noted.update(form=chosen, load=asdict(load_of(job)))
        return chosen

    def routed(form: str | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            expert_module.choose_form = note if form is None else lambda _job: form  # type: ignore[assignment,return-value]
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


def compare(
    shape: Shape, layout: str, *, frozen: bool, repeats: int, clock: Callable[[], float], backward: bool, forms: str
) -> dict[str, Any]:
    """Print one row, and return it: the ratio of each variant to the base."""
    layer = shape.layer(layout)
    layer.base_layer.requires_grad_(not frozen)
    x = torch.randn(shape.batch, shape.inputs, *shape.space, requires_grad=True)
    noted: dict[str, Any] = {}
    runs = variants(layer, x, shape.names(), forms=forms, noted=noted)
    medians = timed(runs, [x, *layer.parameters()], backward=backward, repeats=repeats, clock=clock)
    base = medians.pop("base")
    known = min((value for name, value in medians.items() if name != "chosen"), default=medians["chosen"])
    row = "  ".join(f"{name} {value / base:5.2f}" for name, value in medians.items())
    what = f"{shape.name}, {layout}{', frozen base' if frozen else ''}, {'f+b' if backward else 'fwd'}"
    print(f"{what:72s} base {base * 1e3:7.1f} ms  {row}  chosen/best {medians['chosen'] / known:.2f}", flush=True)
    ratios = {name: value / base for name, value in medians.items()}
    facts = {"shape": shape.name, "layout": layout, "frozen": frozen, "backward": backward, "base_seconds": base}
    return {"kind": "layer", **facts, **noted, "ratios": ratios, "chosen_to_best": medians["chosen"] / known}


@dataclass(frozen=True)
class Network:
    """A whole network, its batch, and its experts."""

    name: str
    build: Callable[[], nn.Module]
    image: tuple[int, ...]
    batch: int
    present: int
    experts: int
    rank: int


def _shufflenet() -> nn.Module:
    from medlore.models.backbones.shufflenet import ShuffleNetConfig, ShuffleNetV2

    return ShuffleNetV2(ShuffleNetConfig(num_labels=10))


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=10))


def _unet() -> nn.Module:
    from medlore.models.segmenter.unet3d import UNet3d

    return UNet3d(3, [32, 64, 128, 256, 512], blocks=2, strides=[1, 2, 2, 2, 2])


NETWORKS = [
    Network("ShuffleNetV2 128x128 b32, 10 of 10, r 4", _shufflenet, (3, 128, 128), 32, 10, 10, 4),
    Network("ResNet-50 96x96 b16, 10 of 10, r 8", _resnet50, (3, 96, 96), 16, 10, 10, 8),
    Network("3D U-Net (Nano widths) 64x64x32 b2, 2 of 8, r 8", _unet, (3, 64, 64, 32), 2, 2, 8, 8),
]


def compare_network(network: Network, layout: str, *, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Print and return one row: the network with experts against itself without; batch norms use their stored statistics in both."""
    torch.manual_seed(0)
    base = network.build()
    x = torch.randn(network.batch, *network.image)
    with torch.no_grad():
        base(x)  # gathers statistics
    base.eval()
    routed = copy.deepcopy(base)
    names = [f"e{i}" for i in range(network.experts)]
    install_experts(
        routed,
        experts=names,
        ranks=network.rank,
        targets=lambda _name, module: isinstance(module, nn.Conv2d | nn.Conv3d) and module.groups == 1,
        layout=layout,  # type: ignore[arg-type]
        batchnorm="freeze",
    )
    tasks = Shape(1, 1, 1, (1, 1), network.batch, network.present, network.experts).names()

    def with_experts() -> Tensor:
        with route(routed, tasks):
            return _total(routed(x))

    parameters = [*base.parameters(), *routed.parameters()]
    medians = timed({"base": lambda: _total(base(x)), "experts": with_experts}, parameters, backward=True, repeats=repeats, clock=clock)
    ratio = medians["experts"] / medians["base"]
    print(f"{network.name + ', ' + layout:72s} base {medians['base'] * 1e3:7.1f} ms  experts {ratio:5.2f}", flush=True)
    return {"kind": "network", "network": network.name, "layout": layout, "base_seconds": medians["base"], "ratio": ratio}


def _total(output: object) -> Tensor:
    """One number that depends on everything: a loss."""
    found = output.logits if hasattr(output, "logits") else output
    return found.square().mean() if isinstance(found, Tensor) else sum(_total(part) for part in found)  # type: ignore[attr-defined,return-value]


def print_memory(shape: Shape, layout: str) -> dict[str, Any]:
    """Print and return peak memory of one forward and backward pass above what was there before, each variant in a fresh process."""
    peaks = {}
    context = multiprocessing.get_context("spawn")
    for variant in ("base", "published", "chosen"):
        queue = context.Queue()
        child = context.Process(target=_peak_of, args=(shape, layout, variant, queue))
        child.start()
        peaks[variant] = queue.get()
        child.join()
    print(f"{shape.name + ', ' + layout:72s} " + "  ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in peaks.items()), flush=True)
    return {"kind": "memory", "shape": shape.name, "layout": layout, "bytes": peaks}


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of docs/performance.md whose name holds `--only`: layers, frozen base, interleaved, published form, networks, memory."""
    clock, repeats = CLOCKS[options.clock], options.repeats
    shapes = [shape for shape in SHAPES if options.only in shape.name]
    rows = []
    for layout, frozen in (("channel", False), ("interleaved", False), ("channel", True)):
        for shape in shapes:
            if frozen and shape.inputs != 256:
                continue
            for backward in (True, False):
                forms = "all" if shape in PUBLISHED and (layout, frozen) == ("channel", False) else "ours"
                rows.append(compare(shape, layout, frozen=frozen, repeats=repeats, clock=clock, backward=backward, forms=forms))
    rows += [
        compare_network(network, layout, repeats=max(repeats // 2, 2), clock=clock)
        for network in NETWORKS
        if options.only in network.name
        for layout in ("channel", "interleaved")
    ]
    return rows + [print_memory(shape, "channel") for shape in shapes if shape in PUBLISHED[-2:]]


def _peak_of(shape: Shape, layout: str, variant: str, queue: multiprocessing.Queue[int]) -> None:
    torch.set_num_threads(1)
    layer = shape.layer(layout)
    x = torch.randn(shape.batch, shape.inputs, *shape.space, requires_grad=True)
    F.conv2d(torch.randn(1, 1, 8, 8), torch.randn(1, 1, 3, 3))  # loads the kernels
    before = _peak_bytes()
    variants(layer, x, shape.names(), forms="all")[variant]().sum().backward()
    queue.put(_peak_bytes() - before)


def _peak_bytes() -> int:
    """Of this process alone: `getrusage` would begin with the peak of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main(arguments: Sequence[str] = ()) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--layout", choices=["channel", "interleaved"], default=None)
    parser.add_argument("--forms", choices=["all", "ours", "chosen"], default="all", help="ours: without the published form")
    parser.add_argument("--frozen", action="store_true", help="the base does not learn")
    parser.add_argument("--networks", action="store_true", help="whole networks instead of layers")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--all", action="store_true", help="every row of docs/performance.md")
    parser.add_argument("--json", type=Path, help="with --all: write the rows to this file; with --refit: read them from it")
    parser.add_argument("--page", type=Path, help="with --all: put the section into this page")
    parser.add_argument("--refit", action="store_true", help="fit the constants of layers/dispatch.py to the rows and print them")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.all or options.refit:
        _measure_and_write(options)
        return
    for layout in [options.layout] if options.layout else ["channel", "interleaved"]:
        _print_rows(options, layout)


def _measure_and_write(options: argparse.Namespace) -> None:
    from benchmarks._expert_page import refit, section
    from benchmarks._page import put_section

    flags = " ".join(f"--{name} {getattr(options, name)}" for name in ("threads", "clock", "repeats"))
    if options.all:
        measured = {"command": f"python -m benchmarks.experts --all {flags}", **describe_machine(), "rows": measure_all(options)}
        if options.json is not None:
            write_json(options.json, measured)
    elif options.json is not None:
        measured = read_json(options.json)
    else:
        raise SystemExit("--refit needs --all, or --json FILE of an earlier --all")
    if options.page is not None:
        put_section(options.page, section(measured, options.json))
    if options.refit:
        print(refit(measured["rows"]))


def _print_rows(options: argparse.Namespace, layout: str) -> None:
    clock, repeats = CLOCKS[options.clock], options.repeats
    for network in NETWORKS if options.networks else ():
        if options.only in network.name:
            compare_network(network, layout, repeats=repeats, clock=clock)
    for shape in SHAPES if options.memory else ():
        if options.only in shape.name:
            print_memory(shape, layout)
    for shape in () if options.networks or options.memory else SHAPES:
        for backward in (True, False):
            if options.only in shape.name:
                compare(shape, layout, frozen=options.frozen, repeats=repeats, clock=clock, backward=backward, forms=options.forms)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
