"""2D backbones through transformers, of the families of `families.FAMILIES`; a fresh seeded head on top."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlore.assets import PREFIX, asset_path
from medlore.errors import CheckpointError, InputError, UnknownNameError
from medlore.files import existing_path, refuse_device
from medlore.models.backbones.bounds import refuse_more_than_the_files_hold, values_beside
from medlore.models.backbones.families import FAMILIES, Family, Triple, family_of
from medlore.models.backbones.identity import backbone_hash, is_hash_of
from medlore.models.backbones.keymaps import convert_state_dict, read_weights
from medlore.models.backbones.statistics import Interpolation, Statistics, read_statistics
from medlore.ranks.model_folders import own_code, refuse_own_code, timm_weights
from medlore.ranks.sources import is_hub_name

if TYPE_CHECKING:
    import torch
    from torch import nn

_NETWORK_FILES = "a .safetensors, .bin, .pth, .pt, .th or .ckpt file of timm, DINOv2 or mmpretrain, or a transformers folder"
ACCEPTED_BACKBONES = "medlore:NAME, a transformers folder, a weights file (.safetensors, .pth), or OWNER/NAME of a hub"
_OTHER_FORM = "give the transformers folder of this model (`medlore ranks` reads more forms, but a network is built from these alone)"


@dataclass(frozen=True)
class Backbone:
    """A pre-trained network with a classification head, and all that one must know to feed it.

    Attributes:
        model: `model(pixel_values=x).logits`, x of shape (b, 3, image_size, image_size), logits of shape (b, classes).
        family: name of the architecture, a key of `families.FAMILIES`.
        image_size: side of the square input, pixels.
        mean: per channel, of images in [0, 1].
        std: per channel, of images in [0, 1].
        interpolation: how images are resized.
        source: where the weights came from, as it was asked for.
        sha256: hash of the weights file, or of a folder without its documents; None for a name that was resolved on the hub.
        head_name: module name of the classification head.
        statistics_from: `checkpoint`, `settings`, or the family whose published statistics were taken in its place.
        notes: what was changed on the way in, e.g. resized position embeddings.
        path: the weights file or folder; None for a name that was resolved on the hub.
    """

    model: nn.Module
    family: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
    source: str
    sha256: str | None
    head_name: str
    statistics_from: str = "checkpoint"
    notes: tuple[str, ...] = field(default=())
    path: Path | None = None

    def has_hash(self, digest: str) -> bool:
        """Whether a hash that a tuned network keeps of its backbone is that of this one; True where there is no file to compare."""
        return self.path is None or is_hash_of(digest, self.path, self.source)

    def head(self) -> nn.Module:
        """The classification head."""
        return self.model.get_submodule(self.head_name)

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, for reports and for finding the backbone again."""
        names = ("family", "image_size", "mean", "std", "interpolation", "source", "sha256", "head_name", "statistics_from", "notes")
        parameters = sum(p.numel() for p in self.model.parameters())
        return {name: getattr(self, name) for name in names} | {"parameters": parameters}


def load_backbone(
    source: str | Path,
    *,
    classes: int,
    image_size: int | None = None,
    heads: int | None = None,
    seed: int = 0,
    keep_head: bool = False,
    mean: Triple | None = None,
    std: Triple | None = None,
) -> Backbone:
    """Load a pre-trained image network and put a fresh head of `classes` outputs on it.

    Args:
        source: `medlore:NAME`, a transformers folder, a timm, DINOv2 or mmpretrain weights file (`.safetensors`, `.pth`), or a
            name of the Hugging Face hub (the only case in which the network is used, and only if the name is not cached).
        classes: outputs of the head, from 1.
        image_size: side of the input, pixels; None keeps the checkpoint's. Position embeddings are resized once.
        heads: attention heads of a ViT weights file without a configuration; by default width / 64.
        seed: seed of the new head (normal, 0.01; bias 0).
        keep_head: keep the stored head; it must have `classes` outputs.
        mean: per channel, of images in [0, 1]; None takes what is stored with the weights, else the family's published values (a note
            says so).
        std: likewise; both or none.

    Raises:
        InputError: no such source, or an image size that the network cannot take.
        CheckpointError: the weights are broken, incomplete, of another architecture, not finite or all zero.

    Examples:
        >>> load_backbone("medlore:no-such-model", classes=2)
        Traceback (most recent call last):
        medlore.errors.UnknownNameError: ...
    """
    if classes < 1:
        raise InputError("classes", f"got {classes}", "a whole number from 1", "give the number of classes")
    stored = read_backbone(source, image_size=image_size, heads=heads, keep_head=keep_head, mean=mean, std=std)
    _place_head(stored, stored.model, classes, seed, keep=keep_head, where=str(source))
    return stored


def read_backbone(
    source: str | Path,
    *,
    image_size: int | None = None,
    heads: int | None = None,
    keep_head: bool = False,
    mean: Triple | None = None,
    std: Triple | None = None,
) -> Backbone:
    """The network as it is stored, checked and resized, before a head is put on it; arguments and errors of `load_backbone`."""
    if (mean is None) != (std is None):
        raise InputError("mean and std", "one without the other", "both or none", "give both")
    from medlore.models.backbones.image_size import check_image_size, image_size_of, with_image_size

    path = asset_path(str(source)) if str(source).startswith(PREFIX) else Path(source)
    timm = timm_weights(path)
    with quiet_transformers():
        if timm is not None and not keep_head:
            family, model, notes, beside = *_from_file(timm, heads), path
        elif path.is_file():
            if keep_head:
                raise InputError("keep_head", f"True with the weights file {path}", "a transformers folder", "name the folder")
            family, model, notes, beside = *_from_file(path, heads), path.parent
        else:
            if not path.is_dir() and not is_hub_name(str(source)):
                existing_path(path, ACCEPTED_BACKBONES, where="model")
            family, model, beside = *_from_transformers(path if path.is_dir() else None, str(source), keep_head=keep_head), path
            notes = ()
    _check_values(model, str(source))
    if image_size is not None and image_size != image_size_of(model):
        notes = (*notes, f"input resized from {image_size_of(model)} to {image_size} pixels")
        model = with_image_size(model, image_size, family)
    check_image_size(model, family)
    model.config.name_or_path = str(source)
    if mean is None or std is None:
        statistics = read_statistics(beside if beside.is_dir() else None, str(source), family)
    else:
        statistics = Statistics(mean, std, "bicubic", "settings")
    return Backbone(
        model=model.eval(),
        family=family.name,
        image_size=image_size_of(model),
        mean=statistics.mean,
        std=statistics.std,
        interpolation=statistics.interpolation,
        source=str(source),
        sha256=backbone_hash(path) if path.exists() else None,
        path=path if path.exists() else None,
        head_name=_head_name(model),
        statistics_from=statistics.origin,
        notes=(*notes, *statistics.notes()),
    )


def with_fresh_head(stored: Backbone, *, classes: int, seed: int = 0) -> Backbone:
    """A copy of what `read_backbone` gave, with the head that `load_backbone` would put on it; `stored` stays as it is."""
    model = copy.deepcopy(stored.model)
    _place_head(stored, model, classes, seed, keep=False, where=stored.source)
    return replace(stored, model=model)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """What did not load we report ourselves; bars and notes of the loader would only hide it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _from_file(path: Path, heads: int | None) -> tuple[Family, Any, tuple[str, ...]]:
    from transformers import AutoConfig

    from medlore.weightfiles import TORCH_SUFFIXES

    if path.suffix.lower() not in (".safetensors", *TORCH_SUFFIXES):
        what = "a JAX .npz file" if path.suffix.lower() == ".npz" else f"a file of type {path.suffix or 'without suffix'!r}"
        raise CheckpointError(str(path), what, _NETWORK_FILES, _OTHER_FORM)
    converted = convert_state_dict(read_weights(path), where=str(path), heads=heads)
    family = FAMILIES[converted.model_type]
    config = AutoConfig.for_model(converted.model_type, **converted.config, num_labels=2)
    model = family.network(config)(config)
    _load_strictly(model, converted.weights, str(path))
    return family, model, (f"read as {converted.naming}", *converted.notes)


def _load_strictly(model: Any, weights: dict[str, torch.Tensor], where: str) -> None:
    """Everything but the head must be there, nothing may be left over, every shape must fit."""
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")}
    faults = [f"missing: {k}" for k in sorted(own.keys() - weights.keys())]
    faults += [f"left over: {k}" for k in sorted(weights.keys() - own.keys())]
    faults += [
        f"shape: {k} is {tuple(weights[k].shape)}, the model has {tuple(own[k].shape)}"
        for k in sorted(own.keys() & weights.keys())
        if weights[k].shape != own[k].shape
    ]
    if faults:
        raise CheckpointError(
            where, f"{len(faults)} tensors do not fit", "a complete state dict", "use a complete checkpoint", faults=faults
        )
    model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)


def _from_transformers(folder: Path | None, name: str, *, keep_head: bool) -> tuple[Family, Any]:
    """Read a transformers folder, or fetch a hub name; old and new parameter names are both understood by transformers."""
    import transformers
    from safetensors import SafetensorError

    import medlore.models.backbones.students  # noqa: F401 - makes its configurations known to transformers

    for file in folder.iterdir() if folder is not None else ():
        refuse_device(file)
    if folder is not None and not (folder / "config.json").is_file():
        raise InputError(
            str(folder),
            "a folder without config.json",
            "a transformers folder",
            "name the folder that holds config.json, or a weights file",
        )
    place = str(folder) if folder is not None else name
    values = None if folder is None else values_beside(folder, name)
    try:
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=folder is not None, trust_remote_code=False)  # nosec B615 # the user names it
        refuse_own_code(config.to_dict(), name)
        family = _known_family(config.model_type, name)
        config = family.prepare(config)
        config.num_labels = _stored_labels(config)
        network = family.network(config)
        refuse_more_than_the_files_hold(network, config, values, name)
        model, report = network.from_pretrained(
            place, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype="float32"
        )
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(name, f"cannot be read ({_first_line(error)})", "whole weights files", "fetch the folder again") from error
    except ImportError as error:
        came = f"a network for which transformers needs another library ({_first_line(error)})"
        raise CheckpointError(name, came, "a ViT, Swin, DINOv2, CLIP or ResNet of transformers", _OTHER_FORM) from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise own_code(name, "code of its own") from error
        raise _not_found(name, error, local=folder is not None) from error
    _check_report(report, name, head_wanted=keep_head, has_head=hasattr(model, "classifier"))
    return family, model if family.classifier is None else family.classifier(model)


def _stored_labels(config: Any) -> int:
    return max(1, int(getattr(config, "num_labels", 2)))


def _known_family(model_type: str, name: str) -> Family:
    family = family_of(model_type)
    if family is None:
        known = [word for each in FAMILIES.values() for word in each.model_types]
        fix = f"use one of {', '.join(each.caption for each in FAMILIES.values())}"
        raise UnknownNameError(f"{name}, model_type", model_type, known, fix)
    return family


# Parts that other uses of a checkpoint bring along or leave out; anything else that is missing or left over is an error.
_MAY_BE_LEFT_OVER = (
    "classifier", "head", "pooler", "lm_head", "decoder", "text_", "visual_projection", "logit_scale", "logit_bias", "cls_classifier",
    "distillation_classifier", "relative_position_index", "position_ids", "mask_token", "num_batches_tracked",
)  # fmt: skip
_MAY_BE_MISSING = ("classifier", "mask_token", "position_ids", "num_batches_tracked")


def _check_report(report: dict[str, Any], where: str, *, head_wanted: bool, has_head: bool) -> None:
    """Everything that is asked for was in the files; a head that is thrown away may be missing or have other outputs."""
    may_be_missing = tuple(word for word in _MAY_BE_MISSING if word != "classifier" or not head_wanted)

    def outside(keys: Any, allowed: tuple[str, ...]) -> list[str]:
        names = [k if isinstance(k, str) else k[0] for k in keys]
        return sorted(k for k in names if not any(word in k for word in allowed))

    faults = [f"missing: {k}" for k in outside(report.get("missing_keys", ()), may_be_missing)]
    faults += ["missing: classifier"] if head_wanted and not has_head else []
    faults += [f"left over: {k}" for k in outside(report.get("unexpected_keys", ()), _MAY_BE_LEFT_OVER)]
    faults += [f"shape: {k}" for k in outside(report.get("mismatched_keys", ()), () if head_wanted else ("classifier",))]
    if faults:
        raise CheckpointError(
            where, f"{len(faults)} tensors do not fit its configuration", "a complete checkpoint", "fetch the folder again", faults=faults
        )


def _not_found(name: str, error: Exception, *, local: bool) -> InputError:
    if local:
        return CheckpointError(
            name, f"cannot be loaded ({_first_line(error)})", "a transformers folder with config.json and weights", "fetch it again"
        )
    return InputError(
        "model",
        f"{name!r} is no file, no folder, and could not be fetched from the hub ({_first_line(error)})",
        ACCEPTED_BACKBONES,
        "check the spelling and the current folder; for hub names check the network",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check_values(model: Any, where: str) -> None:
    import torch

    faults = []
    for name, parameter in model.named_parameters():
        if name.startswith("classifier."):
            continue
        if not bool(torch.isfinite(parameter).all()):
            faults.append(f"{name}: holds values that are not finite")
        elif parameter.ndim == 2 and name.endswith(".weight") and not bool(parameter.any()):
            faults.append(f"{name}: all zero")
    if faults:
        raise CheckpointError(
            where, f"{len(faults)} broken weights", "finite, trained weights", "use another copy of the file", faults=faults
        )


def _head_name(model: Any) -> str:
    modules = reversed(list(model.named_modules()))
    return str(next(n for n, m in modules if n.split(".")[0] == "classifier" and not list(m.children())))


def _place_head(stored: Backbone, model: Any, classes: int, seed: int, *, keep: bool, where: str) -> None:
    import torch
    from torch import nn

    from medlore.models.backbones.image_size import vision_config

    name = stored.head_name
    old = model.get_submodule(name)
    if keep:
        if not isinstance(old, nn.Linear) or old.out_features != classes:
            raise CheckpointError(where, f"a head of {getattr(old, 'out_features', 0)} outputs", f"{classes} outputs", "retrain the head")
        return
    width = old.in_features if isinstance(old, nn.Linear) else FAMILIES[stored.family].width(vision_config(model.config))
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    model.set_submodule(name, head)
    model.num_labels = classes
    model.config.num_labels = classes
