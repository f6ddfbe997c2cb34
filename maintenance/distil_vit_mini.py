"""How `medlore:vit-mini` was made: a small ViT learns the tokens of a frozen DINOv2.

    python -m maintenance.distil_vit_mini maintenance/distil-vit-mini.yaml --data DATA --teacher FOLDER --start FOLDER --out RUN

The teacher is any DINOv2 folder whose patches fall on the student's (14 pixels at 112 against 8 at 64: eight a side each).
The student's class token learns the class token and the mean patch of the teacher through a linear map, its patches the
teacher's patches, and its own similarities within a batch those of the teacher; where an image has a class, a softmax
joins in. A part of the patches is seen until the last steps. Every draw of a step comes from a generator seeded by (seed,
step) and the teacher's answers are kept on disk, so a run that was stopped and gone on with ends with the same bits.
`RUN/state.pt` is written now and then and gone on with when it is there; `--steps` changes the length of the schedule from
that step on and `--distinct` the number of images (the teacher's answers are what costs most); the state remembers both.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, ViTConfig, ViTModel

from maintenance.distillation_images import Pool, read_pool
from maintenance.teacher_store import TeacherStore
from medlore.files import atomic_path

STATE = "state.pt"
_LUMA = (0.299, 0.587, 0.114)


class DistilSettings(pydantic.BaseModel):
    """Everything that decides the weights; `counts` says how many images of each source are in the pool."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    counts: dict[str, int]
    image_size: int = 64
    patch_size: int = 8
    width: int = 256
    depth: int = 8
    heads: int = 4
    mlp_width: int = 512
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


class Student(nn.Module):
    """The ViT and what is thrown away after the distillation: its maps to the teacher's tokens and a classifier."""

    def __init__(self, settings: DistilSettings, teacher_width: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.vit = ViTModel(vit_config(settings), add_pooling_layer=False)
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


def vit_config(settings: DistilSettings) -> ViTConfig:
    """The architecture that is shipped."""
    return ViTConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        intermediate_size=settings.mlp_width,
    )


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


@dataclass
class Trainer:
    """Weights, optimiser and moving average of one run, and what it learns from."""

    settings: DistilSettings
    pool: Pool
    store: TeacherStore
    student: Student
    optimiser: torch.optim.AdamW
    average: dict[str, Tensor]
    scale: Scale
    step: int = 0
    plans: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Length of the schedule."""
        return self.plans[-1][1]

    @property
    def distinct(self) -> int:
        """How many images of the pool are seen."""
        return self.plans[-1][2]

    @classmethod
    def start(cls, settings: DistilSettings, pool: Pool, store: TeacherStore, start: Path | None) -> Trainer:
        """A new run; `start` is a ViT folder of the same shape whose weights are the beginning."""
        student = Student(settings, store.tokens.shape[-1], len(pool.classes))
        if start is not None:
            earlier = ViTModel.from_pretrained(start, add_pooling_layer=False, local_files_only=True, dtype=torch.float32)  # nosec B615 # a local folder
            student.vit.load_state_dict(earlier.state_dict())
        matrices = [p for p in student.parameters() if p.ndim > 1 and p.shape[0] != 1]
        vectors = [p for p in student.parameters() if p.ndim <= 1 or p.shape[0] == 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
        average = {k: v.clone() for k, v in student.state_dict().items()}
        scale = Scale.measured(store.rows(np.sort(shuffled(len(pool.images), settings.seed, 0)[:256])))
        return cls(settings, pool, store, student, optimiser, average, scale, plans=[(0, settings.steps, len(pool.images))])

    def train_step(self) -> dict[str, float]:
        """One update; the parts of its loss."""
        s = self.settings
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + self.step)
        chosen = self.batch_rows()
        pixels, targets = self._views(chosen, generator)
        kept = None
        patches = targets.shape[1] - 1
        if self.step < s.full_from * self.steps and s.kept_patches < patches:
            kept = torch.rand(len(pixels), patches, generator=generator).argsort(1)[:, : s.kept_patches]
        parts = self._losses(self.student(pixels, kept), targets, kept, torch.from_numpy(self.pool.labels[chosen]))
        loss = torch.stack(list(parts.values())).sum()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"step {self.step}: the loss is {loss.item()}: lower learning_rate and start anew")
        loss.backward()
        self._update()
        return {name: value.item() for name, value in parts.items()}

    def batch_rows(self) -> NDArray[np.int64]:
        """Rows of this step's images: every image once in a round, each round in another order.

        With fewer distinct images than the pool holds, the rounds run over the first of the first round: a run that is cut to
        what its first round has come to goes on as if it had been planned so.
        """
        count, size, seed = self.distinct, self.settings.batch_size, self.settings.seed
        seen = shuffled(len(self.pool.images), seed, 0)[:count]
        places = np.arange(self.step * size, (self.step + 1) * size)
        rounds = {r: seen if r == 0 else seen[shuffled(count, seed, r)] for r in (int(places[0] // count), int(places[-1] // count))}
        return np.array([rounds[int(p // count)][p % count] for p in places])

    def _views(self, chosen: NDArray[np.int64], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.settings
        images = torch.from_numpy(self.pool.images[chosen]).permute(0, 3, 1, 2).float() / 255
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        images = recoloured(images, generator, colour=s.colour, grey=s.grey)
        return (images - 0.5) / 0.5, mirrored(self.store.rows(chosen), flip)

    def _losses(self, tokens: Tensor, targets: Tensor, kept: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        s, (mean, spread) = self.settings, self.scale.of_class
        joined = (class_targets(targets) - mean) / spread
        patches = targets[:, 1:]
        if kept is not None:
            patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
        patches = (patches - self.scale.of_patches[0]) / self.scale.of_patches[1]
        token, named = tokens[:, 0], labels >= 0
        scores = self.student.classifier(token[named])
        label = F.cross_entropy(scores, labels[named], label_smoothing=0.1) if named.any() else scores.sum()
        return {
            "class": s.class_loss * F.mse_loss(self.student.to_class(token), joined),
            "patch": s.patch_loss * F.mse_loss(self.student.to_patches(tokens[:, 1:]), patches),
            "relation": s.relation_loss * F.mse_loss(similarities(token), similarities(joined)),
            "label": s.label_loss * label,
        }

    @torch.no_grad()
    def _update(self) -> None:
        s = self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = s.learning_rate * rate(self.step / self.steps, s.warm_up, s.final_rate)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        decay = min(s.ema_decay, self.step / (self.step + 9))
        for name, value in self.student.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)

    def plan(self, steps: int | None, distinct: int | None) -> None:
        """Change the length of the schedule, or the number of images, from here on."""
        wanted = (steps or self.steps, distinct or self.distinct)
        if wanted[1] > len(self.pool.images) or (wanted[1] != self.distinct and self.step * self.settings.batch_size > wanted[1]):
            raise SystemExit(f"{wanted[1]} distinct images: the pool has {len(self.pool.images)}, and more may have been seen already")
        if wanted != (self.steps, self.distinct):
            self.plans.append((self.step, *wanted))

    def save(self, out: Path) -> None:
        """Write `out/state.pt` and the moving average as `out/backbone`."""
        state = {
            "settings": self.settings.model_dump(mode="json"),
            "step": self.step,
            "plans": self.plans,
            "student": self.student.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "scale": (self.scale.of_class, self.scale.of_patches),
        }
        with atomic_path(out / STATE) as temporary:
            torch.save(state, temporary)
        export(self.settings, self.average, out / "backbone")

    def load(self, out: Path) -> None:
        """Go on from `out/state.pt`."""
        saved = torch.load(out / STATE, weights_only=True)
        if saved["settings"] != self.settings.model_dump(mode="json"):
            raise SystemExit(f"{out / STATE}: made with other settings: go on without changes, or name another folder")
        self.step, self.average = saved["step"], saved["average"]
        self.plans = [tuple(plan) for plan in saved["plans"]]
        self.student.load_state_dict(saved["student"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.scale = Scale(*saved["scale"])


def shuffled(count: int, seed: int, number: int) -> NDArray[np.int64]:
    """The order of round `number` over `count` images."""
    return np.random.default_rng([seed, 7, number]).permutation(count)


def rate(progress: float, warm_up: float, final: float) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine down to `final`."""
    if progress < warm_up:
        return max(progress / warm_up, 1e-3)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def export(settings: DistilSettings, weights: dict[str, Tensor], folder: Path) -> None:
    """The ViT alone as an ordinary transformers folder in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {k: v for k, v in vit_config(settings).to_dict().items() if k not in {"id2label", "label2id", "_attn_implementation"}}
    tensors = {k.removeprefix("vit."): v.half().contiguous() for k, v in weights.items() if k.startswith("vit.")}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    side = {"height": settings.image_size, "width": settings.image_size}
    pixels = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": side, "resample": 3, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    for name, value in (("config", described | {"architectures": ["ViTModel"], "dtype": "float16"}), ("preprocessor_config", pixels)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def kept_pool(file: Path, data: Path, settings: DistilSettings) -> Pool:
    """The pool of `settings`, read once and kept beside the run: going on costs no decoding and sees the same images."""
    if not file.is_file():
        pool = read_pool(data, settings.counts, size=settings.image_size, seed=settings.seed)
        with atomic_path(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, images=pool.images, labels=pool.labels, classes=np.array(pool.classes), counts=json.dumps(pool.counts))
    with np.load(file, allow_pickle=False) as held:
        return Pool(held["images"], held["labels"], tuple(held["classes"].tolist()), json.loads(str(held["counts"])))


def train(trainer: Trainer, out: Path, *, until: int, save_seconds: float = 300.0) -> None:
    """Steps up to `until`, the state saved now and then and at the end."""
    began = saved = time.perf_counter()
    first = trainer.step
    while trainer.step < until:
        parts = trainer.train_step()
        if trainer.step % 20 == 0:
            each = (time.perf_counter() - began) / (trainer.step - first)
            losses = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
            stored = trainer.store.ready.mean()
            note(f"{time.strftime('%H:%M:%S')} step {trainer.step}/{trainer.steps}  {losses}  {each:.2f} s/step  stored {stored:.0%}")
        if time.perf_counter() - saved > save_seconds:
            trainer.save(out)
            saved = time.perf_counter()
    trainer.save(out)


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
    parser.add_argument("--steps", type=int, help="another length of the schedule, from here on")
    parser.add_argument("--distinct", type=int, help="see only so many images of the pool, from here on; only within the first round")
    parser.add_argument("--halt-at", type=int, help="stop after this step, to go on later")
    given = parser.parse_args(arguments)
    settings = DistilSettings(**yaml.safe_load(given.settings.read_text(encoding="utf-8")))
    given.out.mkdir(parents=True, exist_ok=True)
    pool = kept_pool(given.out / "pool.npz", given.data, settings)
    note(f"{len(pool.images)} images, {len(pool.classes)} classes: {pool.counts}")
    teacher = AutoModel.from_pretrained(given.teacher, local_files_only=True, dtype=torch.float32)  # nosec B615 # a local folder
    store = TeacherStore.open(teacher, pool.images, settings.teacher_size, given.store or given.out / "teacher")
    trainer = Trainer.start(settings, pool, store, given.start)
    if (given.out / STATE).is_file():
        trainer.load(given.out)
        note(f"goes on at step {trainer.step}")
    trainer.plan(given.steps, given.distinct)
    train(trainer, given.out, until=min(given.halt_at or trainer.steps, trainer.steps))
    note(f"schedule (from step, steps, distinct images): {trainer.plans}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
