"""A tuned model on disk: what was learnt, and beside it everything that one must know to use it again.

========= ============ ==============================================================================================
form      folder       content
========= ============ ==============================================================================================
adapter   `adapter/`   a PEFT folder; `peft.PeftModel.from_pretrained(base, folder)` reads it too
weights   `weights/`   `trained.safetensors`: the trained tensors alone, under the names of the backbone and of what the
                       card says is added to it (`modules`)
model     `model/`     a transformers folder with the whole network
========= ============ ==============================================================================================

Each holds `medlore.json`: backbone (source, hash, input size, statistics, where it is cut), classes, task and method; and beside it
hashes of the images that trained it (`trained_on`) and the head of the logistic regression with the same labels (`reference`).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
from torch import nn

from medlore.data.images.transforms import Preprocessing
from medlore.errors import CheckpointError, DataError, InputError, StepError
from medlore.files import read_json, write_json
from medlore.layers.adapter_folder import quiet_peft
from medlore.layers.surgery import load_trainable_state
from medlore.layers.tuning.interface import TRAINED_NAMES, WEIGHTS_FILE, Form, Tuning
from medlore.layers.tuning.methods import add_modules
from medlore.layers.tuning.modules import AddedModules, absorb
from medlore.models.backbones.cutting import Cut, Reading, cut_backbone
from medlore.models.backbones.reading import Backbone, load_backbone
from medlore.weightfiles import read_tensors

CARD_SCHEMA = "medlore/tuned/1"
CARD_FILE = "medlore.json"


class TunedCard(pydantic.BaseModel):
    """What `medlore.json` says."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    method: str
    form: Form
    classes: tuple[str, ...]
    task: Literal["single", "multi"]
    source: str
    sha256: str | None
    family: str
    image_size: int
    heads: int | None = None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic"]
    head_name: str
    modules: AddedModules | None = None
    cut: tuple[int, Reading] | None = None

    @property
    def is_probe(self) -> bool:
        """Whether it is a linear classifier of frozen features."""
        return self.method == "linear-probe"


@dataclass(frozen=True)
class Tuned:
    """A tuned model that is ready to predict.

    Attributes:
        model: `model(pixel_values=x).logits`, adapters merged.
        card: what it is.
        folder: where it came from.
        preprocessing: how its images are prepared.
    """

    model: nn.Module
    card: TunedCard
    folder: Path
    preprocessing: Preprocessing


def save_tuned(
    tuning: Tuning,
    out: Path,
    *,
    backbone: Backbone,
    method: str,
    classes: tuple[str, ...],
    task: str,
    heads: int | None,
    cut: Cut | None = None,
) -> Path:
    """Write what was learnt below `out`, with its card; the folder's name is its form.

    Args:
        tuning: the method in its network.
        out: folder of the run.
        backbone: what it was installed in.
        method: its name.
        classes: in the order of the head's outputs.
        task: `single` or `multi`.
        heads: attention heads, where the user said how many.
        cut: where the head reads, if not where the backbone's own does.
    """
    from safetensors import SafetensorError

    folder = out / tuning.form
    try:
        tuning.save(folder)
    except SafetensorError as error:  # its writer's word for a full disk
        raise StepError(str(folder), f"could not be written ({error})", "a disk with room", "free space or name another folder") from error
    write_json(
        folder / CARD_FILE,
        {
            "schema": CARD_SCHEMA,
            "method": method,
            "form": tuning.form,
            "classes": classes,
            "task": task,
            "source": _findable(backbone.source),
            "sha256": backbone.sha256,
            "family": backbone.family,
            "image_size": backbone.image_size,
            "heads": heads,
            "mean": backbone.mean,
            "std": backbone.std,
            "interpolation": backbone.interpolation,
            "head_name": backbone.head_name,
            "modules": None if tuning.modules is None else asdict(tuning.modules),
            **({} if cut is None else {"cut": [cut.block, cut.reading]}),  # left out, so that earlier versions read what they can
        },
    )
    if tuning.form == "model":
        modes = {"nearest": 0, "bilinear": 2, "bicubic": 3}
        statistics = {"image_mean": backbone.mean, "image_std": backbone.std, "resample": modes[backbone.interpolation]}
        write_json(
            folder / "preprocessor_config.json", statistics | {"size": {"height": backbone.image_size, "width": backbone.image_size}}
        )
    return folder


def load_tuned(path: str | Path, *, model: str | Path | None = None) -> Tuned:
    """Load a run folder, or the `adapter`, `weights` or `model` folder in it.

    Args:
        path: the folder.
        model: where the backbone lies now, if it was moved; its hash must still be the same.

    Raises:
        InputError: no such folder, or nothing tuned in it.
        CheckpointError: broken files, or a backbone that is not the one it was tuned on.
    """
    folder = _tuned_folder(Path(path))
    card = _read_card(folder / CARD_FILE)
    network = _network(folder, card, model)
    preprocessing = Preprocessing(card.image_size, card.mean, card.std, card.interpolation)
    return Tuned(network.eval(), card, folder, preprocessing)


def _network(folder: Path, card: TunedCard, model: str | Path | None) -> nn.Module:
    if card.form == "model":
        return _whole_network(folder, card)
    backbone = frozen_backbone(card, model)
    if card.sha256 is not None and not backbone.has_hash(card.sha256):
        raise CheckpointError(
            str(folder),
            f"tuned on {card.source} with hash {card.sha256[:12]}, but {backbone.source} has {str(backbone.sha256)[:12]}",
            "the same backbone that it was tuned on",
            "name that backbone with --model, or tune again on this one",
        )
    if card.form == "weights":
        file = folder / WEIGHTS_FILE
        if card.modules is not None:
            try:
                add_modules(backbone.model, card.modules, backbone.head_name)
            except DataError as error:
                raise error.at(str(folder / CARD_FILE)) from error
        load_trainable_state(backbone.model, read_tensors(file), expected=_trained_names(file))
        return absorb(backbone.model)
    return _with_adapter(backbone.model, folder)


def frozen_backbone(card: TunedCard, model: str | Path | None = None) -> Backbone:
    """The backbone that was tuned, cut where it was cut, with a fresh head.

    Args:
        card: what `medlore.json` says.
        model: where the backbone lies now, if it was moved.
    """
    backbone = load_backbone(model or card.source, classes=len(card.classes), image_size=card.image_size, heads=card.heads)
    return backbone if card.cut is None else cut_backbone(backbone, Cut(*card.cut), classes=len(card.classes))


def _whole_network(folder: Path, card: TunedCard) -> nn.Module:
    """A network that was written whole; one that is read otherwise than its family is built anew around the stored head."""
    count = len(card.classes)
    stored = load_backbone(folder, classes=count) if card.cut is not None else load_backbone(folder, classes=count, keep_head=True)
    if card.cut is None:
        return stored.model
    network = cut_backbone(stored, Cut(*card.cut), classes=count)
    names = [f"{card.head_name}.{part}" for part in ("weight", "bias")]
    tensors = {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in read_tensors(file).items()}
    load_trainable_state(network.model, {name: tensors[name] for name in names if name in tensors}, expected=names)
    return network.model


def _trained_names(file: Path) -> list[str]:
    """The tensors that the header says were written; empty for a file of an earlier version, which does not say."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        stated = (opened.metadata() or {}).get(TRAINED_NAMES, "[]")
    try:
        names = json.loads(stated)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(file), "no list of names in its header", "the file as it was written", "copy it again") from error
    return [str(name) for name in names] if isinstance(names, list) else []


def _with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """Base and PEFT folder as one plain network; PEFT passes silently over keys that fit nothing, we do not."""
    import peft
    from safetensors import SafetensorError

    try:
        with quiet_peft(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)  # an error below
            tuned: Any = peft.PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            str(folder), f"does not fit its backbone ({reason})", "a complete PEFT folder", "copy the folder again"
        ) from error
    stored = read_tensors(folder / "adapter_model.safetensors")
    unmerged = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    lost = sorted(set(stored) ^ set(unmerged))
    if lost:
        raise CheckpointError(
            str(folder), f"{len(lost)} tensors of it have no place", "a complete PEFT folder", "copy it again", faults=lost
        )
    return tuned.merge_and_unload()  # type: ignore[no-any-return]


def _tuned_folder(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(
            str(path),
            "a file" if path.is_file() else "is a device or a pipe" if path.exists() else "no such folder",
            "the folder of a run of `medlore finetune`, or the adapter in it",
            "check the spelling",
        )
    for folder in (path, *(path / form for form in ("adapter", "weights", "model"))):
        if (folder / CARD_FILE).is_file():
            return folder
    if (path / "adapter_config.json").is_file():
        raise InputError(
            str(path),
            "a PEFT folder without medlore.json",
            "one that `medlore finetune` wrote",
            "load it with peft.PeftModel.from_pretrained",
        )
    raise InputError(str(path), "nothing tuned in it", "a folder with adapter/, weights/ or model/", "name the --out of `medlore finetune`")


def _read_card(file: Path) -> TunedCard:
    content = read_json(file)
    if not isinstance(content, dict) or content.pop("schema", None) != CARD_SCHEMA:
        raise DataError(str(file), "another schema", CARD_SCHEMA, "tune again with this version")
    try:
        return TunedCard.model_validate(content)
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise DataError(str(file), f"{len(faults)} faults", "the card as it was written", "tune again", faults=faults) from error


def _findable(source: str) -> str:
    """A relative path is made absolute, so that the card still leads to the backbone from another folder."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source
