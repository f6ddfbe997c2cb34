"""Supervised pre-training of a small ViT on labelled archives: how `medlore:vit-mini` was made.

Run with ``python -m maintenance.pretrain studies/pretrain-vit-mini-1.yaml --data DIR --out RUN``. On a CPU with
bfloat16 units the arithmetic runs in bfloat16 with float32 master weights; the loop is the engine of every other training.
``torchrun --nproc-per-node 2 -m ...`` shares every batch between processes; on a busy machine that is far faster than two
threads, which wait for each other after every operation. All draws of a step come from a generator seeded by (seed, step,
process): a run that was stopped and resumed on as many processes ends with the same bits as one that was not.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maintenance.pretrain_images import LabelledImages, augment, balanced_order, mix, read_labelled_zips
from maintenance.pretrain_network import accuracy_by_source, build_vit, export_backbone, forward_kept, normalise
from maintenance.pretrain_settings import PretrainSettings
from medlore.errors import CheckpointError, MedloreError
from medlore.files import existing_file
from medlore.runs.report import Run
from medlore.runs.settings_file import read_settings
from medlore.training.accelerator import make_accelerator
from medlore.training.checkpoint import Checkpoint, read_saved
from medlore.training.loop import train
from medlore.training.masters import MasterWeights
from medlore.training.task import Judgement, Stretch, Task
from medlore.training.watching import Watcher

_STATE = "state.pt"


@dataclass(frozen=True)
class _Batch:
    """This process's part of a batch: pixels b c h w, targets b classes, kept patches b k."""

    pixels: Tensor
    targets: Tensor
    kept: Tensor | None


class PretrainTask(Task):
    """What the engine is given: float32 master weights, a low-precision copy that computes, and their moving average.

    Args:
        settings: what to train.
        parts: `train` and `val`.
        accelerator: processes.
        out: folder of the run; whenever a state is written, the average is exported there.
    """

    def __init__(self, settings: PretrainSettings, parts: Mapping[str, LabelledImages], accelerator: Any, out: Path) -> None:
        self.settings, self.data, self.validation, self.out = settings, parts["train"], parts["val"], out
        classes = len(self.data.classes)
        master = build_vit(settings, classes)
        if settings.start_from is not None:
            master.load_state_dict(_weights_of(existing_file(settings.start_from, where="start_from")))
        worker = build_vit(settings, classes).to(_compute_type())
        super().__init__("pre-training", worker, accelerator, seed=settings.seed)
        self.worker = worker
        self.weights = MasterWeights(master, worker)
        self.order = _order(settings, self.data)

    def prepare(self) -> None:
        """Gradients are averaged in float32 when the masters take them, not in the type that computes."""

    def release(self) -> None:
        """Nothing was put around the network."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The masters."""
        return self.weights.masters.named_parameters()

    def spares(self, name: str, parameter: nn.Parameter) -> bool:
        """Class token and position embeddings too."""
        return super().spares(name, parameter) or parameter.shape[0] == 1

    def batches(self, start: int, stop: int) -> Generator[_Batch]:
        """All draws of a step come from a generator seeded by (seed, step, process)."""
        s, index, count = self.settings, self.accelerator.process_index, self.accelerator.num_processes
        for step in range(start, stop):
            generator = torch.Generator().manual_seed((s.seed * 1_000_003 + step) * 64 + index)
            chosen = self.order[step * s.batch_size : (step + 1) * s.batch_size][index::count]
            pixels, targets = self._images(chosen, generator)
            kept = None
            if step < s.full_from * s.steps:
                patches = (s.image_size // s.patch_size) ** 2
                kept = torch.rand(len(pixels), patches, generator=generator).argsort(1)[:, : s.kept_patches]
            yield _Batch(pixels, targets, kept)

    def _images(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, data = self.settings, self.data
        images = data.images[chosen].float() / 255
        images = augment(images, generator, smallest_area=s.smallest_area, colour=s.colour, grey=s.grey)
        targets = F.one_hot(data.labels[chosen], len(data.classes)).float()
        images, targets = mix(images, targets, generator, share=s.mix_share)
        return normalise(images), targets

    def loss(self, batch: _Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy with smoothed labels."""
        del step
        scores = forward_kept(self.worker, batch.pixels.to(_compute_type()), batch.kept).float()
        return {"classes": F.cross_entropy(scores, batch.targets, label_smoothing=self.settings.label_smoothing)}

    def gather_gradients(self) -> None:
        """From the copy to the masters."""
        self.weights.take_gradients(self.accelerator)

    def updated(self, step: int) -> None:
        """From the masters to the copy."""
        del step
        self.weights.fill_copy()

    def judge(self, stretch: Stretch) -> Judgement:
        """Validation accuracy of the average by archive; its backbone is exported."""
        if not self.accelerator.is_main_process:
            return Judgement()
        weights = self.weights.masters.state_dict()
        judged = build_vit(self.settings, len(self.validation.classes))
        judged.load_state_dict(weights)
        accuracy = accuracy_by_source(judged.to(_compute_type()).eval(), self.validation)
        export_backbone(self.settings, weights, self.out / "backbone")
        return Judgement({"step": stretch.step, "accuracy": accuracy})

    def state(self) -> dict[str, Tensor]:
        """The masters."""
        return self.weights.masters.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Masters and copy."""
        self.weights.masters.load_state_dict(state)
        self.weights.fill_copy()


def _weights_of(state: Path) -> dict[str, Tensor]:
    """The master weights of an earlier stage; states that were written before there was one engine call them `master`."""
    accepted, fix = "the state.pt of an earlier stage", "name another file"
    saved = read_saved(state, accepted, fix)
    weights = next((saved[name] for name in ("weights", "master") if name in saved), None) if isinstance(saved, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(str(state), "another kind of file", accepted, fix)
    return weights


class _Notes(Watcher):
    """A line on stderr every fifty steps and after every judgement."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings, self.loss, self.done, self.first, self.began = settings, math.nan, 0, 0, time.perf_counter()

    def skip(self, steps: int) -> None:
        """Speed is that of this run."""
        self.done = self.first = steps

    def step(self, loss: float) -> None:
        """Remember the loss."""
        self.loss, self.done = loss, self.done + 1

    def losses(self, stretch: Stretch) -> None:
        """How fast it goes."""
        speed = (stretch.step - self.first) * self.settings.batch_size / (time.perf_counter() - self.began)
        _note(f"step {stretch.step}/{self.settings.steps}  loss {self.loss:.3f}  {speed:.0f} images/s")

    def epoch(self, record: dict[str, Any]) -> None:
        """How good it is."""
        _note(f"step {record['step']}  validation " + "  ".join(f"{k} {v:.3f}" for k, v in record["accuracy"].items()))


def pretrain(
    settings: PretrainSettings, data: Path, out: Path, *, resume: bool = False, save_seconds: float = 300.0, halt_at: int | None = None
) -> dict[str, Any]:
    """Train, save the state now and then, and write the moving average of the weights to `out/backbone`.

    Args:
        settings: what to train.
        data: folder of the archives.
        out: folder of the run.
        resume: go on from `out/state.pt` if it is there.
        save_seconds: time between two saved states.
        halt_at: leave after this many steps, as if interrupted.

    Returns:
        Step, loss and validation accuracy by archive.

    Raises:
        StepError: the loss is not finite; the last good state is kept.
        CheckpointError: `resume`, and the state is damaged or belongs to other settings.
    """
    accelerator = make_accelerator("cpu", "fp32")
    archives = [data / name for name in settings.archives]
    parts = read_labelled_zips(archives, image_size=settings.image_size, skip_classes=settings.skip_classes)
    task = PretrainTask(settings, parts, accelerator, out)
    schedule = settings.in_steps(halt_at)
    checkpoint = Checkpoint(out / _STATE, settings.model_dump_json(), save_seconds / 60, restart="start again without --resume")
    if not accelerator.is_main_process:
        train(task, schedule, checkpoint=checkpoint, resume=resume)
        return {}
    with Run("pretrain", out, settings=settings, seed=settings.seed, device="cpu") as run:
        for archive in archives:
            run.add_input(archive)
        notes = _Notes(settings)
        history = train(task, schedule, checkpoint=checkpoint, resume=resume, watcher=notes)
        run.add_output("backbone", out / "backbone")
        run.results = {
            "steps": notes.done,
            "loss": notes.loss,
            "validation_accuracy": history.scores[-1]["accuracy"],
            "training_images": len(parts["train"].labels),
            "validation_images": len(parts["val"].labels),
            "classes": len(parts["train"].classes),
            "processes": accelerator.num_processes,
        }
    return run.results


def _order(settings: PretrainSettings, data: LabelledImages) -> Tensor:
    weights = torch.tensor([settings.class_weights.get(name.split(":")[0], 1.0) for name in data.classes])
    generator = torch.Generator().manual_seed(settings.seed)
    return balanced_order(data.labels, weights, settings.steps * settings.batch_size, generator)


def _compute_type() -> torch.dtype:
    fast = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX")) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this recipe."""
    parser = argparse.ArgumentParser(prog="python -m maintenance.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", help="YAML file, e.g. studies/pretrain-vit-mini-1.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    given = parser.parse_args(arguments)
    try:
        results = pretrain(read_settings(PretrainSettings, given.settings), given.data, given.out, resume=given.resume)
    except MedloreError as error:
        _note(str(error))
        return error.exit_status
    print(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
