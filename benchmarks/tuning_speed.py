"""What a step of LoRA costs against PEFT's own, and an epoch of a linear probe on features computed once against one without.

    python -m benchmarks.tuning_speed [--only step|probe] [--repeats N] [--threads N] [--clock wall|cpu] [--page docs/performance.md]

The step: forward, backward and AdamW of ViT-B/16 (random weights, 5 classes) on 4 images of 224 pixels, factors on query, value and
output projection at the stable ranks of the ImageNet-21k weights, the same model and images for all variants. PEFT's own is its model
as `peft.get_peft_model` gives it, with torch's AdamW. Variants take turns within one run; what is printed is the ratio of medians to
PEFT's own in float32, and the largest relative distance of a gradient to PEFT's in the same precision.

The probe: one epoch (batch 4) through the frozen network, and one on features; the first epoch with them pays for computing them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._page import put_section
from medlore.layers.adapter_folder import quiet_peft
from medlore.layers.lora.step import quicken
from medlore.layers.surgery import freeze, thaw_head
from medlore.layers.tuning.interface import Tuning
from medlore.training.accelerator import make_accelerator
from medlore.training.watching import Watchers
from medlore.tuning.examples import feature_examples
from medlore.tuning.training import EpochSchedule, Examples, Trainer

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TITLE = "## The cost of a tuning step"
# of the fused qkv and of the output projection, blocks 0 to 11. Source: Zhang et al., ICCV 2025, ViT-B/16 of ImageNet-21k
QKV_RANKS = (9, 25, 44, 69, 78, 85, 106, 102, 105, 116, 99, 78)
OUT_RANKS = (10, 35, 54, 78, 86, 94, 69, 53, 21, 73, 85, 42)


def vit_base() -> Any:
    """ViT-B/16 with random weights."""
    import transformers

    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=5))


def with_factors() -> Any:
    """The same under PEFT; factors are not zero, as after a few steps."""
    import peft

    ranks = {
        f"vit.layers.{block}.attention.{part}_proj": rank
        for block, (qkv, out) in enumerate(zip(QKV_RANKS, OUT_RANKS, strict=True))
        for part, rank in (("q", qkv), ("v", qkv), ("o", out))
    }
    config = peft.LoraConfig(
        target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks, r=1, lora_alpha=1, modules_to_save=["classifier"]
    )
    with quiet_peft():
        tuned = peft.get_peft_model(vit_base(), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return tuned.train()


class Step:
    """One variant of the step on one model."""

    def __init__(self, model: Any, *, quick: bool, precision: torch.dtype | None) -> None:
        self.model, self.quick, self.precision = model, quick, precision
        self.images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0, fused=quick or None)  # the weights stay as they are
        self.gradients: list[Tensor] = []

    def __call__(self) -> None:
        """Forward, backward, update."""
        with torch.autocast("cpu", self.precision or torch.bfloat16, enabled=self.precision is not None):
            logits = self.model(pixel_values=self.images).logits
        nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
        self.optimizer.step()
        self.gradients = [p.grad for p in self.trained if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)


def seconds_of(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time of one call."""
    begun = clock()
    run()
    return clock() - begun


def measure_steps(repeats: int, clock: Callable[[], float]) -> list[tuple[str, float, float]]:
    """Variant, ratio to PEFT in float32, distance of its gradients; each round runs every variant once, after one that is not counted."""
    plain, ours = with_factors(), with_factors()
    quicken(ours, logits_only=True)
    steps = {
        f"{who}, {word}": Step(model, quick=who == "ours", precision=precision)
        for word, precision in (("float32", None), ("bfloat16 autocast", torch.bfloat16))
        for who, model in (("PEFT", plain), ("ours", ours))
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            taken[name].append(seconds_of(step, clock))
    middle = {name: statistics.median(values[1:]) for name, values in taken.items()}
    return [
        (name, middle[name] / middle["PEFT, float32"], distance(step.gradients, steps[name.replace("ours", "PEFT")].gradients))
        for name, step in steps.items()
    ]


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest relative distance of two lists of gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(left, right, strict=True))


def measure_probe(repeats: int, clock: Callable[[], float], *, images: int = 8) -> tuple[float, float, bool]:
    """Uncached to cached epoch, the same with computing the features counted in, and whether both end with the same head."""
    accelerator = make_accelerator("cpu", "fp32", None)
    pixels = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    plain = Examples(lambda chosen, *, step: pixels[torch.from_numpy(chosen)], np.arange(images) % 5)
    taken: dict[str, list[float]] = {"uncached": [], "features": [], "cached": []}
    model = vit_base().eval()
    start = {name: p.clone() for name, p in model.classifier.state_dict().items()}
    ends: list[Tensor] = []
    freeze(model)
    thaw_head(model, "classifier")
    for _ in range(repeats):
        begun = clock()
        features = feature_examples(plain, model, "classifier", accelerator=accelerator)
        taken["features"].append(clock() - begun)
        for name, network, examples in (("uncached", model, plain), ("cached", model.classifier, features)):
            model.classifier.load_state_dict(start)
            taken[name].append(seconds_of(functools.partial(one_epoch, network, examples, accelerator), clock))
            ends.append(model.classifier.weight.detach().clone())
    median = {name: statistics.median(values) for name, values in taken.items()}
    same = all(torch.allclose(end, ends[0], rtol=1e-4, atol=1e-6) for end in ends)
    return median["uncached"] / median["cached"], median["uncached"] / (median["features"] + median["cached"]), same


def one_epoch(model: nn.Module, examples: Examples, accelerator: Any) -> None:
    """One epoch of the trainer that `medlore finetune` uses."""
    tuning = Tuning(model, "weights", lambda _folder: None, lambda: model)
    schedule = EpochSchedule(epochs=1, batch_size=4, learning_rate=1e-2)
    trainer = Trainer(tuning, "single", schedule, accelerator, judge=lambda _targets, _scores: 0.0, watcher=Watchers([]))
    trainer.fit(examples, None)


def section(command: str, steps: list[tuple[str, float, float]], probe: tuple[float, float, bool] | None) -> str:
    """The section of the page of results."""
    lines = [
        TITLE,
        "",
        f"`{command}`: ViT-B/16 with random weights, 4 images of 224 pixels, factors on query, value and",
        "output projection at the stable ranks of the ImageNet-21k weights. Forward, backward and AdamW, in turn; ratios of medians.",
    ]
    if steps:
        ratios = {name: ratio for name, ratio, _ in steps}
        lines += [
            "",
            "| step | to PEFT in float32 | to PEFT in the same precision | largest relative distance of a gradient |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {ratio:.2f} | {ratio / ratios[name.replace('ours', 'PEFT')]:.2f} | {'' if 'PEFT' in name else f'{far:.1e}'} |"
            for name, ratio, far in steps
        ]
    if probe is not None:
        epoch, first, same = probe
        lines += [
            "",
            f"An epoch of a linear probe on features that are computed once is {epoch:.0f} times faster than one through the network",
        ]
        lines += [f"({'the same' if same else 'ANOTHER'} head comes out); an epoch that also computes them, {first:.2f} times."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] = ()) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning_speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("step", "probe"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--page", type=Path, help="put the section into this page; without, it is printed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    steps = measure_steps(options.repeats, clock) if options.only != "probe" else []
    probe = measure_probe(options.repeats, clock) if options.only != "step" else None
    flags = f"--repeats {options.repeats} --threads {options.threads} --clock {options.clock}"
    text = section(f"python -m benchmarks.tuning_speed {flags}", steps, probe)
    print(text)
    if options.page is not None:
        put_section(options.page, text)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
