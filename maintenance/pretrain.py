"""Supervised pre-training of a small ViT on labelled archives: how `medlore:vit-mini` was made.

Run with ``python -m maintenance.pretrain studies/pretrain-vit-mini.yaml --data DIR --out RUN``. On a CPU with
bfloat16 units the arithmetic runs in bfloat16 with float32 master weights. ``torchrun --nproc-per-node 2 -m ...`` shares
every batch between processes; on a busy machine that is far faster than two threads, which wait for each other after
every operation. All draws of a step come from a generator seeded by (seed, step, process): a run that was stopped and
resumed on as many processes ends with the same bits as one that was not.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from maintenance.pretrain_images import LabelledImages, augment, balanced_order, mix, read_labelled_zips
from medlore.errors import CheckpointError, MedloreError, StepError
from medlore.files import atomic_folder, atomic_path, existing_file, write_json
from medlore.runs.settings import Run, Settings, read_settings, seed_everything

_STATE = "state.pt"
_CHANNEL_MEAN = _CHANNEL_STD = (0.5, 0.5, 0.5)


class PretrainSettings(Settings):
    """Everything that decides the weights.

    `class_weights` maps the stem of an archive to the relative frequency of each of its classes (1 if absent);
    `kept_patches` of the patches are seen per image until the share `full_from` of the steps, then all. `start_from` is the
    `state.pt` of an earlier stage, whose weights (not its optimiser) are the start; `stop_at` ends a stage before its schedule.
    """

    archives: tuple[str, ...]
    skip_classes: tuple[str, ...] = ()
    class_weights: dict[str, float] = pydantic.Field(default_factory=dict)
    image_size: int = 64
    patch_size: int = 8
    width: int = 256
    depth: int = 8
    heads: int = 4
    mlp_width: int = 512
    steps: int = 3600
    batch_size: int = 128
    kept_patches: int = 32
    full_from: float = 0.85
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: float = 0.05
    final_rate: float = 0.01
    label_smoothing: float = 0.1
    mix_share: float = 0.3
    smallest_area: float = 0.35
    colour: float = 0.3
    grey: float = 0.15
    ema_decay: float = 0.998
    seed: int = 0
    start_from: Path | None = None
    stop_at: int | None = None


def build_vit(settings: PretrainSettings, classes: int) -> ViTForImageClassification:
    """The network at its random start, drawn from `settings.seed`; position embeddings start as 2D sine waves."""
    seed_everything(settings.seed)
    config = ViTConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        intermediate_size=settings.mlp_width,
        num_labels=classes,
        attn_implementation="eager",  # on a CPU the fused kernel takes twice the time at 33 tokens
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = sine_positions(settings.image_size // settings.patch_size, settings.width)
    return model


def sine_positions(side: int, width: int) -> Tensor:
    """Position embeddings of a square grid: a quarter of the width each for sine and cosine of row and column.

    Args:
        side: patches along an edge.
        width: size of an embedding, a multiple of 4.

    Returns:
        side**2 d, of the spread that transformers draws position embeddings with (0.02).
    """
    place = torch.arange(side, dtype=torch.float32)
    rate = torch.exp(-math.log(100.0) * torch.arange(width // 4) / (width // 4))
    wave = torch.cat([torch.sin(place[:, None] * rate), torch.cos(place[:, None] * rate)], dim=1)  # side d/2
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return 0.02 * math.sqrt(2.0) * torch.cat([rows, columns], dim=1)


def forward_kept(model: ViTForImageClassification, pixels: Tensor, kept: Tensor | None) -> Tensor:
    """Class scores from a part of the patches.

    Args:
        model: the classifier.
        pixels: b c h w, normalised.
        kept: b k, indices of the patches that are seen; None for all.

    Returns:
        b classes.
    """
    tokens = model.vit.embeddings(pixels)  # b 1+n d
    if kept is not None:
        patches = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1)
    for block in model.vit.layers:
        tokens = block(tokens)
    scores: Tensor = model.classifier(model.vit.layernorm(tokens)[:, 0])
    return scores


@dataclass(frozen=True)
class _Share:
    """Which part of every batch this process computes."""

    index: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> _Share:
        """The share that `torchrun` gave to this process; everything without it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        distributed.init_process_group("gloo")
        return cls(distributed.get_rank(), distributed.get_world_size())

    def mean(self, gradient: Tensor) -> Tensor:
        """The mean over all processes, computed in place."""
        if self.count > 1:
            distributed.all_reduce(gradient)
            gradient /= self.count
        return gradient


@dataclass
class _Trainer:
    """Float32 master weights with their optimiser and moving average, and the low-precision copy that computes."""

    settings: PretrainSettings
    master: ViTForImageClassification
    average: dict[str, Tensor]
    optimiser: torch.optim.AdamW
    worker: ViTForImageClassification
    step: int = 0

    @classmethod
    def start(cls, settings: PretrainSettings, classes: int) -> _Trainer:
        master = build_vit(settings, classes)
        matrices = [p for p in master.parameters() if p.ndim > 1 and p.shape[0] != 1]
        vectors = [p for p in master.parameters() if p.ndim <= 1 or p.shape[0] == 1]  # norms, biases, cls and position embeddings
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
        if settings.start_from is not None:
            earlier = torch.load(existing_file(settings.start_from, where="start_from"), weights_only=True)
            master.load_state_dict(earlier["master"])
        worker = build_vit(settings, classes).to(_compute_type())
        worker.load_state_dict(master.state_dict())
        return cls(settings, master, {k: v.clone() for k, v in master.state_dict().items()}, optimiser, worker)

    def train_step(self, data: LabelledImages, order: Tensor, share: _Share) -> float:
        """One update; returns the loss of this process's part of the batch."""
        s = self.settings
        generator = torch.Generator().manual_seed((s.seed * 1_000_003 + self.step) * 64 + share.index)
        chosen = order[self.step * s.batch_size : (self.step + 1) * s.batch_size][share.index :: share.count]
        pixels, targets = self._batch(data, chosen, generator)
        kept = None
        if self.step < s.full_from * s.steps:
            patches = (s.image_size // s.patch_size) ** 2
            kept = torch.rand(len(pixels), patches, generator=generator).argsort(1)[:, : s.kept_patches]
        scores = forward_kept(self.worker, pixels.to(_compute_type()), kept).float()
        loss = F.cross_entropy(scores, targets, label_smoothing=s.label_smoothing)
        loss.backward()
        self._update(share)
        self.step += 1
        return loss.item()

    def _batch(self, data: LabelledImages, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.settings
        images = data.images[chosen].float() / 255
        images = augment(images, generator, smallest_area=s.smallest_area, colour=s.colour, grey=s.grey)
        targets = F.one_hot(data.labels[chosen], len(data.classes)).float()
        images, targets = mix(images, targets, generator, share=s.mix_share)
        return normalise(images), targets

    @torch.no_grad()
    def _update(self, share: _Share) -> None:
        s = self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = s.learning_rate * schedule(self.step / s.steps, s.warm_up, s.final_rate)
        pairs = [(own, w) for own, w in zip(self.master.parameters(), self.worker.parameters(), strict=True) if w.grad is not None]
        gradient = share.mean(torch.cat([w.grad.flatten().float() for _, w in pairs if w.grad is not None]))
        for (own, computed), part in zip(pairs, gradient.split([own.numel() for own, _ in pairs]), strict=True):
            own.grad, computed.grad = part.view_as(own), None
        nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        self.optimiser.step()
        for own, computed in pairs:
            computed.copy_(own)
        decay = min(s.ema_decay, (self.step + 1) / (self.step + 10))
        for name, value in self.master.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)

    def state(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(mode="json"),
            "step": self.step,
            "master": self.master.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }

    def load(self, file: Path) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: the state belongs to other settings.
        """
        saved = torch.load(file, weights_only=True)
        if saved["settings"] != self.settings.model_dump(mode="json"):
            raise CheckpointError(
                str(file), "made with other settings", "the settings of this run", "resume without changes, or start anew"
            )
        self.step, self.average = saved["step"], saved["average"]
        self.master.load_state_dict(saved["master"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.worker.load_state_dict(saved["master"])


def schedule(progress: float, warm_up: float, final_rate: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `final_rate`.

    Args:
        progress: share of the steps done, 0 to 1.
        warm_up: share of the steps spent on warming up.
        final_rate: factor at the end; 1 keeps the rate.

    Example:
        >>> schedule(0.05, 0.1), schedule(0.1, 0.1), round(schedule(1.0, 0.1), 4)
        (0.5, 1.0, 0.01)
    """
    if progress < warm_up:
        return max(progress / warm_up, 1e-3)
    done = (progress - warm_up) / (1 - warm_up)
    return final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def normalise(images: Tensor) -> Tensor:
    """Images in 0 to 1 (b 3 h w) as the network takes them."""
    return (images - torch.tensor(_CHANNEL_MEAN).view(3, 1, 1)) / torch.tensor(_CHANNEL_STD).view(3, 1, 1)


def accuracy_by_source(model: ViTForImageClassification, data: LabelledImages) -> dict[str, float]:
    """Top-1 accuracy over all classes, separately for the images of each archive."""
    dtype = next(model.parameters()).dtype
    with torch.inference_mode():
        parts = [model(pixel_values=normalise(part.float() / 255).to(dtype)).logits.argmax(1) for part in data.images.split(128)]
    right = torch.cat(parts) == data.labels
    sources = [name.split(":")[0] for name in data.classes]
    of_image = [sources[label] for label in data.labels.tolist()]
    return {source: right[torch.tensor([other == source for other in of_image])].float().mean().item() for source in dict.fromkeys(sources)}


def export_backbone(settings: PretrainSettings, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the network without its classifier as an ordinary transformers folder in float16."""
    config = build_vit(settings, 2).config
    described = {k: v for k, v in config.to_dict().items() if k not in {"id2label", "label2id", "_attn_implementation"}}
    described |= {"architectures": ["ViTModel"], "dtype": "float16"}
    tensors = {name.removeprefix("vit."): value.half().contiguous() for name, value in weights.items() if name.startswith("vit.")}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        write_json(temporary / "config.json", described)
        write_json(temporary / "preprocessor_config.json", _preprocessing(settings.image_size))


def _preprocessing(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(_CHANNEL_MEAN),
        "image_std": list(_CHANNEL_STD),
    }


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
        StepError: the loss is not finite.
    """
    share = _Share.join()
    archives = [data / name for name in settings.archives]
    parts = read_labelled_zips(archives, image_size=settings.image_size, skip_classes=settings.skip_classes)
    trainer = _Trainer.start(settings, len(parts["train"].classes))
    if resume and (out / _STATE).is_file():
        trainer.load(out / _STATE)
    last_step = min(settings.steps, settings.stop_at or settings.steps, halt_at or settings.steps)
    if share.index > 0:
        _train(trainer, parts["train"], share, last_step=last_step)
        return {}
    with Run("pretrain", out, settings=settings, seed=settings.seed, device="cpu") as run:
        for archive in archives:
            run.add_input(archive)
        saver = _Saver(parts["val"], out, save_seconds)
        loss = _train(trainer, parts["train"], share, last_step=last_step, saver=saver)
        accuracy = saver.save(trainer)
        run.add_output("backbone", out / "backbone")
        run.results = {
            "steps": trainer.step,
            "loss": loss,
            "validation_accuracy": accuracy,
            "training_images": len(parts["train"].labels),
            "validation_images": len(parts["val"].labels),
            "classes": len(parts["train"].classes),
            "processes": share.count,
        }
    return run.results


def _train(trainer: _Trainer, data: LabelledImages, share: _Share, *, last_step: int, saver: _Saver | None = None) -> float:
    """Steps until `last_step`; returns the last loss."""
    s, first, started, loss = trainer.settings, trainer.step, time.perf_counter(), math.nan
    order = _order(s, data)
    while trainer.step < last_step:
        loss = trainer.train_step(data, order, share)
        if not math.isfinite(loss):
            raise StepError(f"step {trainer.step}", f"the loss is {loss}", "a finite loss", "lower learning_rate and start anew")
        if saver is None:
            continue
        if trainer.step % 50 == 0:
            speed = (trainer.step - first) * s.batch_size / (time.perf_counter() - started)
            _note(f"step {trainer.step}/{s.steps}  loss {loss:.3f}  {speed:.0f} images/s")
        if saver.due():
            saver.save(trainer)
    return loss


def _order(settings: PretrainSettings, data: LabelledImages) -> Tensor:
    weights = torch.tensor([settings.class_weights.get(name.split(":")[0], 1.0) for name in data.classes])
    generator = torch.Generator().manual_seed(settings.seed)
    return balanced_order(data.labels, weights, settings.steps * settings.batch_size, generator)


class _Saver:
    """Writes state and backbone to the folder of the run, now and then."""

    def __init__(self, validation: LabelledImages, out: Path, seconds: float) -> None:
        self._validation, self._out, self._seconds = validation, out, seconds
        self._saved = time.perf_counter()

    def due(self) -> bool:
        return time.perf_counter() - self._saved > self._seconds

    def save(self, trainer: _Trainer) -> dict[str, float]:
        """Write everything; returns the validation accuracy of the moving average."""
        with atomic_path(self._out / _STATE) as temporary:
            torch.save(trainer.state(), temporary)
        judged = build_vit(trainer.settings, len(self._validation.classes))
        judged.load_state_dict(trainer.average)
        accuracy = accuracy_by_source(judged.to(_compute_type()).eval(), self._validation)
        export_backbone(trainer.settings, trainer.average, self._out / "backbone")
        _note(f"step {trainer.step}  validation " + "  ".join(f"{k} {v:.3f}" for k, v in accuracy.items()))
        self._saved = time.perf_counter()
        return accuracy


def _compute_type() -> torch.dtype:
    fast = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX")) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this recipe."""
    parser = argparse.ArgumentParser(prog="python -m maintenance.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", help="YAML file, e.g. studies/pretrain-vit-mini.yaml")
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
