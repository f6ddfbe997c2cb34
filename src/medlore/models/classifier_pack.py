"""Expert packs of classifiers: a folder with a manifest, the shared base, and one file per expert.

::

    PACK/
    ├── manifest.json            schema medlore/expert-pack/2, kind "classifier": student, tasks, ranks, hashes, licence, metrics
    ├── base.safetensors         the shared base
    ├── experts/NAME.safetensors factors and head of one expert
    └── README.md                the model card, where there is one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from medlore.assets import PREFIX, asset_path
from medlore.errors import CheckpointError, InputError, UnknownNameError
from medlore.files import sha256_of
from medlore.layers.experts.surgery import BatchNormWay, install_experts, merge
from medlore.linalg.matricize import Layout
from medlore.models import packs
from medlore.models.backbones.shufflenet import Norm
from medlore.models.backbones.students import StudentKind, build_student, feature_width
from medlore.models.multitask import MultiTaskNetwork
from medlore.models.statefile import read_state

KIND = "classifier"
_FILE = "experts/{}.safetensors"
_LARGEST_IMAGE = 2048  # pixels a side, as in the settings of a study
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class ExpertEntry:
    """What a pack knows of one expert.

    Attributes:
        name: of the task and of the expert.
        classes: labels, in the order of the head's outputs.
        kind: `single` or `multi`.
        ranks: layer -> rank of this expert's factors.
        metrics: measured on the task's test part when the pack was made.
        licence: of the data that the expert was trained on.
    """

    name: str
    classes: tuple[str, ...]
    kind: str
    ranks: dict[str, int]
    metrics: dict[str, Any] = field(default_factory=dict)
    licence: str = "not stated"


@dataclass(frozen=True)
class ClassifierPack:
    """A decomposed classifier in memory.

    Attributes:
        manifest: as read.
        network: body with experts and heads, in fp32, in eval mode.
        experts: name -> entry.
    """

    manifest: dict[str, Any]
    network: MultiTaskNetwork
    experts: dict[str, ExpertEntry]

    @property
    def image_size(self) -> int:
        """Side of the input, in pixels."""
        return int(self.manifest["preprocessing"]["image_size"])

    def merged(self, expert: str) -> nn.Module:
        """A plain network, body with its classifier, that needs nothing of MedLoRE's layers; the pack is not touched.

        Raises:
            UnknownNameError: the pack has no such expert.
        """
        if expert not in self.experts:
            raise UnknownNameError("--expert", expert, self.experts)
        body = merge(self.network.body, expert)
        return with_classifier(body, self.network.heads[expert], self.experts[expert])


def with_classifier(body: nn.Module, head: nn.Module, entry: ExpertEntry) -> nn.Module:
    """Put a head on a body without classes, in the place where its family keeps its classifier."""
    import copy

    head = copy.deepcopy(head)
    network: Any = body
    old = network.classifier
    network.classifier = nn.Sequential(nn.Flatten(), head) if isinstance(old, nn.Sequential) else head
    config = getattr(network, "config", None)
    if config is not None:
        config.id2label = dict(enumerate(entry.classes))
        config.label2id = {name: number for number, name in enumerate(entry.classes)}
        config.problem_type = "single_label_classification" if entry.kind == "single" else "multi_label_classification"
        if hasattr(network, "num_labels"):
            network.num_labels = len(entry.classes)
    return body.eval()


def save_classifier_pack(
    path: str | Path,
    network: MultiTaskNetwork,
    *,
    student: Mapping[str, Any],
    experts: Mapping[str, ExpertEntry],
    preprocessing: Mapping[str, Any],
    layout: str,
    weights: str = "fp16",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pack as a whole or not at all.

    Args:
        path: the folder; replaced if it exists.
        network: body with experts, and heads.
        student: the arguments of `build_student`.
        experts: task -> entry.
        preprocessing: image_size, mean, std, interpolation.
        layout: of the factors.
        weights: `fp32` or `fp16`.
        extra: further entries of the manifest (name, teacher).
    """
    shares = split_state({k: _stored(v, _DTYPES[weights]) for k, v in network.state_dict().items()}, list(experts))
    manifest = {
        "schema": packs.SCHEMA,
        "kind": KIND,
        **(extra or {}),
        "student": dict(student),
        "preprocessing": dict(preprocessing),
        "layout": layout,
        "weights": weights,
        "parameters": sum(v.numel() for share in shares.values() for v in share.values() if v.is_floating_point()),
        "experts": {k: _entry_json(e) for k, e in experts.items()},
    }
    files = {packs.BASE: shares[None], **{_file_of(expert): shares[expert] for expert in experts}}
    return packs.write_pack(path, manifest, files)


def split_state(state: Mapping[str, Tensor], experts: list[str]) -> dict[str | None, dict[str, Tensor]]:
    """Sort a state dict by owner: None (the shared base, with the statistics of all) and each expert (factors, scalings, head)."""
    shares: dict[str | None, dict[str, Tensor]] = {None: {}, **{e: {} for e in experts}}
    for key, value in state.items():
        # heads.TASK.weight, ....lora_A.TASK: elsewhere the name of a task is that of a module, such as `conv1`
        names = key.split(".")
        own = names[-2:-1] in (["lora_A"], ["lora_B"], ["lora_scaling"])
        owner = names[1] if names[0] == "heads" else names[-1] if own else None
        shares[owner if owner in experts else None][key] = value
    return shares


def load_classifier_pack(path: str | Path) -> ClassifierPack:
    """Read a pack; hashes and every key and shape are checked.

    Raises:
        CheckpointError: a file is missing or altered, or keys do not fit; all faults of the pack in one report.
    """
    folder = asset_path(str(path)) if str(path).startswith(PREFIX) else Path(path)
    manifest = read_classifier_manifest(folder)
    experts = {name: _entry_from(name, values) for name, values in manifest["experts"].items()}
    state: dict[str, Tensor] = {}
    for file in manifest["files"]:
        state.update({k: v.float() if v.dtype == torch.float16 else v for k, v in read_state(folder / file).items()})
    _refuse_sizes(experts, state, str(folder / packs.MANIFEST))
    network = _rebuild(manifest, experts)
    _load_strictly(network, state, str(folder))
    return ClassifierPack(manifest, network.eval(), experts)


def read_classifier_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a pack, its values and the hashes of all files checked.

    Raises:
        CheckpointError: values that no pack has, a file that is missing or altered; all of them in one report.
    """
    manifest = packs.read_manifest(folder, kind=KIND)
    faults = _student_faults(manifest["student"]) + _preprocessing_faults(manifest["preprocessing"])
    faults += [f"layout: {manifest['layout']!r}"] if manifest["layout"] not in get_args(Layout) else []
    faults += ["experts: none"] if not manifest["experts"] else []
    for name, entry in manifest["experts"].items():
        faults += _expert_faults(name, entry)
        faults += [] if _FILE.format(name) in manifest["files"] else [f"files: no {_FILE.format(name)}"]
    way = manifest.get("batchnorm", "refuse")
    faults += [] if way in get_args(BatchNormWay) else [f"batchnorm: {way!r}"]
    if faults:
        place = str(folder / packs.MANIFEST)
        raise CheckpointError(place, f"{len(faults)} fault(s)", "what `medlore decompose` writes", "fetch the pack again", faults=faults)
    _check_files(folder, manifest["files"])
    if packs.format_of(manifest) == 1 and any(name.endswith(".lora_scaling") for name in read_state(folder / packs.BASE)):
        raise packs.older(folder, "its scalings are kept by position")
    return manifest


def _student_faults(student: Mapping[str, Any]) -> list[str]:
    accepted = {"kind": get_args(StudentKind), "norm": get_args(Norm), "stem_stride": (1, 2)}
    faults = [f"student.{name}: unknown" for name in student if name not in accepted]
    faults += ["student.kind: missing"] if "kind" not in student else []
    return faults + [
        f"student.{name}: {student[name]!r}" for name, known in accepted.items() if name in student and student[name] not in known
    ]


def _preprocessing_faults(values: Mapping[str, Any]) -> list[str]:
    size = values.get("image_size")
    faults = [] if type(size) is int and 1 <= size <= _LARGEST_IMAGE else [f"preprocessing.image_size: {size!r}"]
    for name in ("mean", "std"):
        found = values.get(name)
        if not isinstance(found, list) or len(found) != 3 or not all(isinstance(v, int | float) for v in found):
            faults.append(f"preprocessing.{name}: {found!r}")
    mode = values.get("interpolation")
    return faults if mode in ("nearest", "bilinear", "bicubic", "lanczos") else [*faults, f"preprocessing.interpolation: {mode!r}"]


def _expert_faults(name: str, entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"experts.{name}: a {type(entry).__name__}"]
    classes, ranks = entry.get("classes"), entry.get("ranks")
    faults = (
        []
        if isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)
        else [f"experts.{name}.classes: {classes!r}"]
    )
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
        faults.append(f"experts.{name}.ranks: not layer -> whole number from 0")
    faults += [] if entry.get("kind") in ("single", "multi") else [f"experts.{name}.kind: {entry.get('kind')!r}"]
    faults += [] if isinstance(entry.get("metrics"), dict) else [f"experts.{name}.metrics: not a mapping"]
    faults += [] if isinstance(entry.get("licence"), str) else [f"experts.{name}.licence: {entry.get('licence')!r}"]
    return faults


def _refuse_sizes(experts: Mapping[str, ExpertEntry], state: Mapping[str, Tensor], where: str) -> None:
    """Ranks and classes beyond the number of values are known to be wrong before anything of their size is made."""
    values = sum(tensor.numel() for tensor in state.values())
    faults = [f"experts.{e.name}.ranks.{layer}: {rank}" for e in experts.values() for layer, rank in e.ranks.items() if rank > values]
    faults += [f"experts.{e.name}.classes: {len(e.classes)}" for e in experts.values() if len(e.classes) > values]
    faults += [f"{name}: not finite" for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if faults:
        came = f"{len(faults)} entries that {values} values cannot have, or values that are not finite"
        raise CheckpointError(where, came, "what `medlore decompose` writes", "fetch the pack again", faults=faults)


def _rebuild(manifest: Mapping[str, Any], experts: Mapping[str, ExpertEntry]) -> MultiTaskNetwork:
    size = manifest["preprocessing"]["image_size"]
    body = build_student(**manifest["student"], image_size=size)
    width = feature_width(body, size)
    layers = {layer for e in experts.values() for layer in e.ranks}
    ranks = {(layer, name): e.ranks.get(layer, 0) for layer in layers for name, e in experts.items()}
    install_experts(
        body,
        experts=list(experts),
        ranks=ranks,
        targets=lambda name, _module: name in layers,
        layout=manifest["layout"],
        batchnorm=manifest.get("batchnorm", "refuse"),
    )
    return MultiTaskNetwork(body, {name: len(e.classes) for name, e in experts.items()}, width=width, experts=True)


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    faults = []
    for name, digest in files.items():
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        if not inside:
            faults.append(f"{name}: lies outside the pack")
        elif not (folder / name).is_file():
            faults.append(f"{name}: missing")
        elif sha256_of(folder / name) != digest:
            faults.append(f"{name}: altered since the pack was written (its SHA-256 differs)")
    if faults:
        raise CheckpointError(
            str(folder),
            f"{len(faults)} of {len(files)} files do not fit the manifest",
            "the files as written",
            "fetch the pack again",
            faults=faults,
        )


def _load_strictly(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    faults = [f"missing: {k} {s}" for k, s in wanted.items() if k not in state]
    faults += [f"unexpected: {k} {tuple(v.shape)}" for k, v in state.items() if k not in wanted]
    faults += [
        f"misshapen: {k} is {tuple(state[k].shape)}, the network has {s}"
        for k, s in wanted.items()
        if k in state and tuple(state[k].shape) != s
    ]
    if faults:
        raise CheckpointError(
            where,
            f"{len(faults)} keys that do not fit",
            "the keys and shapes of the described student",
            "fetch the pack again, or make it again with the study: its manifest describes another network than its files hold",
            faults=faults,
        )
    network.load_state_dict(dict(state))


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in the pack's type; what is no float32 (counters, scalings) as it is."""
    return value.detach().to(dtype if value.dtype == torch.float32 else value.dtype).contiguous().cpu()


def _file_of(expert: str) -> str:
    if set("/\\\0") & set(expert) or expert.startswith("."):
        raise InputError("expert name", repr(expert), "letters, digits, blanks, - and _", "rename the task")
    return _FILE.format(expert)


def _entry_json(entry: ExpertEntry) -> dict[str, Any]:
    return {"classes": list(entry.classes), "kind": entry.kind, "ranks": entry.ranks, "metrics": entry.metrics, "licence": entry.licence}


def _entry_from(name: str, values: Mapping[str, Any]) -> ExpertEntry:
    return ExpertEntry(name, tuple(values["classes"]), values["kind"], dict(values["ranks"]), dict(values["metrics"]), values["licence"])
