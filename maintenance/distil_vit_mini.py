"""How `medlore:vit-mini` was made: a small ViT learns the tokens of a frozen DINOv2.

    python -m maintenance.distil_vit_mini maintenance/distil-vit-mini.yaml --data DATA --teacher FOLDER --start FOLDER --out RUN

The teacher is any DINOv2 folder whose patches fall on the student's (14 pixels at 112 against 8 at 64: eight a side each).
The student's class token learns the class token and the mean patch of the teacher through a linear map, its patches the
teacher's patches, and its own similarities within a batch those of the teacher; where an image has a class, a softmax
joins in. A part of the patches is seen until the last steps. The loop is the engine of every other training: every draw of
a step comes from a generator seeded by (seed, step), and the teacher's answers are kept on disk, so a run that was stopped
ends with the same bits when the same command is run again. `RUN/state.pt` is written every five minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, ViTModel

from maintenance.distillation_images import Pool, read_pool
from maintenance.teacher_store import TeacherStore
from maintenance.vit_shape import VitShape, export_vit
from medlore.errors import InputError, MedloreError
from medlore.files import atomic_path
from medlore.runs.settings_file import read_settings
from medlore.training.accelerator import make_accelerator
from medlore.training.checkpoint import Checkpoint
from medlore.training.history import History
from medlore.training.loop import train
from medlore.training.schedule import CosineOfShares, Schedule
from medlore.training.task import Judgement, Stretch, Task
from medlore.training.watching import Watcher

STATE = "state.pt"
_LUMA = (0.299, 0.587, 0.114)


class DistilSettings(VitShape):
    """Everything that decides the weights.

    `counts` says how many images of each source are in the pool, `distinct` how many of them are seen (the teacher's answers are
    what costs most; None for all).
    """

    counts: dict[str, int]
    distinct: int | None = pydantic.Field(default=None, ge=1)
    teacher_size: int = 112
    steps: int = 1800
    batch_size: int = 64
    kept_patches: int = 32
    full_from: float = 0.9
    learning_rate: float = 7e-4
    weight_decay: float = 0.05
    warm_up: float = 0.04
    final_rate: float = 0.01
    class_loss: float = 1.0
    patch_loss: float = 0.5
    relation_loss: float = 5.0
    label_loss: float = 0.2
    colour: float = 0.2
    grey: float = 0.1
    ema_decay: float = 0.997
    seed: int = 0

    def in_steps(self, halt_at: int | None = None) -> Schedule:
        """The same for the engine.

        Args:
            halt_at: leave after this many steps, as if interrupted.
        """
        return Schedule(
            steps=self.steps,
            rate=CosineOfShares(self.learning_rate, self.final_rate, self.warm_up),
            weight_decay=self.weight_decay,
            clip=1.0,
            betas=(0.9, 0.98),
            ema=self.ema_decay,
            judge_every=None,  # whenever a state is written
            log_every=20,
            stop_at=halt_at,
        )


class Student(nn.Module):
    """The ViT and what is thrown away after the distillation: its maps to the teacher's tokens and a classifier."""

    def __init__(self, settings: DistilSettings, teacher_width: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.vit = ViTModel(settings.config(), add_pooling_layer=False)
        self.to_class = nn.Linear(settings.width, 2 * teacher_width)
        self.to_patches = nn.Linear(settings.width, teacher_width)
        self.classifier = nn.Linear(settings.width, max(1, classes))

    def forward(self, pixels: Tensor, kept: Tensor | None) -> Tensor:
        """Tokens after the last norm, b 1+k d, from pixels b 3 h w (normalised) of which the patches `kept` (b k) are seen."""
        vit: Any = self.vit
        tokens: Tensor = vit.embeddings(pixels)
        if kept is not None:
            patches = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat([tokens[:, :1], patches], dim=1)
        for block in vit.layers:
            tokens = block(tokens)
        normed: Tensor = vit.layernorm(tokens)
        return normed


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and spread of every channel of the teacher, of its class token with the mean patch (2d) and of its patches (d)."""

    of_class: tuple[Tensor, Tensor]
    of_patches: tuple[Tensor, Tensor]

    @classmethod
    def measured(cls, tokens: Tensor) -> Scale:
        """From tokens n 1+p d."""
        joined, patches = class_targets(tokens), tokens[:, 1:].flatten(0, 1)
        return cls((joined.mean(0), joined.std(0) + 1e-4), (patches.mean(0), patches.std(0) + 1e-4))


def class_targets(tokens: Tensor) -> Tensor:
    """The class token beside the mean patch: b 1+p d to b 2d."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)


def mirrored(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Tokens b 1+p d whose patches are mirrored left to right where `chosen` (b, bool): what the mirrored image would give, nearly."""
    side = math.isqrt(tokens.shape[1] - 1)
    grid = tokens[:, 1:].unflatten(1, (side, side))
    patches = torch.where(chosen[:, None, None, None], grid.flip(2), grid).flatten(1, 2)
    return torch.cat([tokens[:, :1], patches], dim=1)


def recoloured(images: Tensor, generator: torch.Generator, *, colour: float, grey: float) -> Tensor:
    """Images (b 3 h w, 0 to 1) with other brightness, contrast and saturation, and some without colour."""
    count = len(images)

    def factor() -> Tensor:
        return (1 + colour * (2 * torch.rand(count, generator=generator) - 1)).view(-1, 1, 1, 1)

    luma = (images * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    keep = (torch.rand(count, generator=generator) >= grey).float().view(-1, 1, 1, 1)
    images = luma + (images - luma) * factor() * keep
    mean = luma.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * factor() + mean * factor()).clamp(0, 1)


def similarities(vectors: Tensor) -> Tensor:
    """Cosines between the rows of b d, the mean row taken off: b b."""
    unit = F.normalize(vectors - vectors.mean(0), dim=1)
    return unit @ unit.T


@dataclass(frozen=True, eq=False)
class _Batch:
    """Pixels b 3 h w (normalised), the teacher's tokens b 1+p d, kept patches b k or None, labels b (-1 for none)."""

    pixels: Tensor
    targets: Tensor
    kept: Tensor | None
    labels: Tensor


class DistilTask(Task):
    """What the engine is given.

    Args:
        settings: what to train.
        pool: images.
        store: the teacher's answers.
        accelerator: device and precision.
        out: folder of the run; whenever a state is written, the average is exported there as `backbone`.
        start: a ViT folder of the same shape whose weights are the beginning; None for a random start.

    Raises:
        InputError: more distinct images than the pool holds.
    """

    def __init__(
        self, settings: DistilSettings, pool: Pool, store: TeacherStore, accelerator: Any, *, out: Path, start: Path | None = None
    ) -> None:
        self.settings, self.pool, self.store, self.out = settings, pool, store, out
        self.distinct = settings.distinct or len(pool.images)
        if self.distinct > len(pool.images):
            raise InputError("distinct", str(self.distinct), f"at most the {len(pool.images)} images of the pool", "ask for fewer")
        self.student = Student(settings, store.tokens.shape[-1], len(pool.classes))
        if start is not None:
            local: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32}
            earlier = ViTModel.from_pretrained(start, add_pooling_layer=False, **local)  # nosec B615 # a local folder
            self.student.vit.load_state_dict(earlier.state_dict())
        self.scale = Scale.measured(store.rows(np.sort(shuffled(len(pool.images), settings.seed, 0)[:256])))
        super().__init__("distillation", self.student, accelerator, seed=settings.seed)

    def spares(self, name: str, parameter: nn.Parameter) -> bool:
        """Class token and position embeddings too."""
        return super().spares(name, parameter) or parameter.shape[0] == 1

    def batches(self, start: int, stop: int) -> Generator[_Batch]:
        """All draws of a step come from a generator seeded by (seed, step)."""
        s = self.settings
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
            chosen = self.rows_of(step)
            pixels, targets = self._views(chosen, generator)
            kept, patches = None, targets.shape[1] - 1
            if step < s.full_from * s.steps and s.kept_patches < patches:
                kept = torch.rand(len(pixels), patches, generator=generator).argsort(1)[:, : s.kept_patches]
            yield _Batch(pixels, targets, kept, torch.from_numpy(self.pool.labels[chosen]))

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """Rows of a step's images: every image once in a round, each round in another order."""
        count, size, seed = self.distinct, self.settings.batch_size, self.settings.seed
        seen = shuffled(len(self.pool.images), seed, 0)[:count]
        places = np.arange(step * size, (step + 1) * size)
        rounds = {r: seen if r == 0 else seen[shuffled(count, seed, r)] for r in (int(places[0] // count), int(places[-1] // count))}
        return np.array([rounds[int(p // count)][p % count] for p in places])

    def _views(self, chosen: NDArray[np.int64], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.settings
        images = torch.from_numpy(self.pool.images[chosen]).permute(0, 3, 1, 2).float() / 255
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        images = recoloured(images, generator, colour=s.colour, grey=s.grey)
        return (images - 0.5) / 0.5, mirrored(self.store.rows(chosen), flip)

    def loss(self, batch: _Batch, step: int) -> dict[str, Tensor]:
        """Distances of class token, patches and relations, and the classes where there are some."""
        del step
        s, (mean, spread) = self.settings, self.scale.of_class
        tokens: Tensor = self.forward(batch.pixels, batch.kept)
        joined = (class_targets(batch.targets) - mean) / spread
        patches = batch.targets[:, 1:]
        if batch.kept is not None:
            patches = patches.gather(1, batch.kept[..., None].expand(-1, -1, patches.shape[-1]))
        patches = (patches - self.scale.of_patches[0]) / self.scale.of_patches[1]
        token, named = tokens[:, 0], batch.labels >= 0
        scores = self.student.classifier(token[named])
        label = F.cross_entropy(scores, batch.labels[named], label_smoothing=0.1) if named.any() else scores.sum()
        return {
            "class": s.class_loss * F.mse_loss(self.student.to_class(token), joined),
            "patch": s.patch_loss * F.mse_loss(self.student.to_patches(tokens[:, 1:]), patches),
            "relation": s.relation_loss * F.mse_loss(similarities(token), similarities(joined)),
            "label": s.label_loss * label,
        }

    def judge(self, stretch: Stretch) -> Judgement:
        """Nothing is chosen; the average is exported."""
        export_vit(self.settings.config(), self.student.state_dict(), self.out / "backbone")
        return Judgement({"step": stretch.step, **stretch.terms})


def shuffled(count: int, seed: int, number: int) -> NDArray[np.int64]:
    """The order of round `number` over `count` images."""
    return np.random.default_rng([seed, 7, number]).permutation(count)


def kept_pool(file: Path, data: Path, settings: DistilSettings) -> Pool:
    """The pool of `settings`, read once and kept beside the run: going on costs no decoding and sees the same images."""
    if not file.is_file():
        pool = read_pool(data, settings.counts, size=settings.image_size, seed=settings.seed)
        with atomic_path(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, images=pool.images, labels=pool.labels, classes=np.array(pool.classes), counts=json.dumps(pool.counts))
    with np.load(file, allow_pickle=False) as held:
        return Pool(held["images"], held["labels"], tuple(held["classes"].tolist()), json.loads(str(held["counts"])))


class _Lines(Watcher):
    """A line on stderr every twenty steps."""

    def __init__(self, task: DistilTask, history: History) -> None:
        self._task, self._history = task, history

    def losses(self, stretch: Stretch) -> None:
        """Losses, speed, and how much of the teacher's answers is there."""
        losses = "  ".join(f"{name} {value:.3f}" for name, value in stretch.terms.items())
        speed, stored = self._history.seconds / stretch.step, self._task.store.ready.mean()
        steps = self._task.settings.steps
        note(f"{time.strftime('%H:%M:%S')} step {stretch.step}/{steps}  {losses}  {speed:.2f} s/step  stored {stored:.0%}")


def distil(task: DistilTask, *, halt_at: int | None = None, save_minutes: float = 5.0) -> History:
    """Train, and go on from `state.pt` in the task's folder when it is there; the average is in `backbone` afterwards.

    Args:
        task: what to train.
        halt_at: leave after this step, to go on later.
        save_minutes: between two states.

    Raises:
        CheckpointError: the state belongs to other settings.
        StepError: the loss is not finite.
    """
    fingerprint = hashlib.sha256(json.dumps(task.settings.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    checkpoint = Checkpoint(task.out / STATE, fingerprint, minutes=save_minutes)
    history = History()
    return train(task, task.settings.in_steps(halt_at), checkpoint=checkpoint, watcher=_Lines(task, history), history=history)


def note(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives and volumes")
    parser.add_argument("--teacher", type=Path, required=True, help="transformers folder of a DINOv2")
    parser.add_argument("--start", type=Path, help="ViT folder of the same shape to begin with; a random start without it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--store", type=Path, help="folder of the teacher's answers; OUT/teacher without it")
    parser.add_argument("--halt-at", type=int, help="stop after this step, to go on later")
    given = parser.parse_args(arguments)
    try:
        _run(given)
    except MedloreError as error:
        note(str(error))
        return error.exit_status
    return 0


def _run(given: argparse.Namespace) -> None:
    settings = read_settings(DistilSettings, given.settings)
    given.out.mkdir(parents=True, exist_ok=True)
    pool = kept_pool(given.out / "pool.npz", given.data, settings)
    note(f"{len(pool.images)} images, {len(pool.classes)} classes: {pool.counts}")
    teacher = AutoModel.from_pretrained(given.teacher, local_files_only=True, dtype=torch.float32)  # nosec B615 # a local folder
    store = TeacherStore.open(teacher, pool.images, settings.teacher_size, given.store or given.out / "teacher")
    task = DistilTask(settings, pool, store, make_accelerator("cpu", "fp32"), out=given.out, start=given.start)
    distil(task, halt_at=given.halt_at)


if __name__ == "__main__":
    sys.exit(main())
