"""One expert of a classifier pack as a network that needs no MedLoRE: safetensors, ONNX, torch.export, or a PEFT adapter."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from medlore.assets import PREFIX, asset_path
from medlore.errors import InputError, StepError, UnknownNameError
from medlore.extras import EXTRAS, require
from medlore.files import atomic_folder, json_text, sha256_of, write_json
from medlore.layers.experts.interchange import save_peft
from medlore.layers.experts.surgery import merge
from medlore.models import packs
from medlore.models.backbones.reading import quiet_transformers
from medlore.models.classifier_pack import KIND, ClassifierPack, load_classifier_pack, with_classifier

ExportFormat = Literal["safetensors", "onnx", "torch-export", "peft"]
_TOLERANCE = 1e-4
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers, which transformers writes
BASE = "base"


def export_classifier(pack: str | Path, expert: str, format: str, out: str | Path) -> dict[str, Any]:  # noqa: A002 - the word of the flag
    """Write one expert of a pack.

    Args:
        pack: folder or `medlore:NAME`.
        expert: its name; `base` is the shared base alone, without a head, as a transformers folder.
        format: `safetensors` (a transformers folder where the student is of that family), `onnx`, `torch-export` or `peft`.
        out: the folder to write; whole or not at all.

    Returns:
        What was written: format, files with their hashes, largest difference from the pack's own output.

    Raises:
        UnknownNameError: no such format or expert.
        MissingExtraError: ONNX packages are not installed.
        StepError: the written network does not answer like the pack's expert.
    """
    if format not in get_args(ExportFormat):
        raise UnknownNameError("--format", format, get_args(ExportFormat))
    opened = load_classifier_pack(pack)
    if expert == BASE and expert not in opened.experts:
        return _export_base(opened, format, out)
    network = opened.merged(expert)
    example = torch.rand(2, 3, opened.image_size, opened.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        wanted = network(pixel_values=example).logits
    writers: dict[str, Callable[[], Tensor]] = {}
    with atomic_folder(out) as folder, quiet_transformers():
        writers["safetensors"] = lambda: _write_safetensors(folder, opened, network, example)
        writers["onnx"] = lambda: _write_onnx(folder, network, example)
        writers["torch-export"] = lambda: _write_torch_export(folder, network, example)
        writers["peft"] = lambda: _write_peft(folder, opened, expert, example)
        difference = float((writers[format]() - wanted).abs().max())
        if not difference <= _TOLERANCE:
            raise StepError(
                f"export of {expert!r}",
                f"outputs differ by {difference:.2e}",
                f"at most {_TOLERANCE:.0e}",
                "report this; nothing was written",
            )
        _write_labels(folder, opened, expert)
        files = {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return {"format": format, "expert": expert, "out": str(out), "files": files, "largest_difference": difference}


def is_classifier_pack(source: str | Path) -> bool:
    """Whether a path or `medlore:NAME` is an expert pack of a classifier."""
    folder = asset_path(str(source)) if str(source).startswith(PREFIX) else Path(source)
    return packs.is_pack(folder) and packs.read_manifest(folder).get("kind") == KIND


def required(expert: str | None, where: str) -> str:
    """The name of the expert.

    Raises:
        InputError: none was given.
    """
    if expert is None:
        raise InputError(where, "nothing", "the name of one expert", "see `medlore info PACK` for the names")
    return expert


def print_classifier_export(summary: dict[str, Any], *, as_json: bool) -> None:
    """One line per file for people, or one JSON object."""
    if as_json:
        sys.stdout.write(json_text(summary) + "\n")
        return
    sys.stdout.write(f"{summary['out']}: expert {summary['expert']}, {summary['format']}\n")
    for name in summary["files"]:
        sys.stdout.write(f"  {name}\n")
    sys.stdout.write(f"largest difference from the pack's own output: {summary['largest_difference']:.1e}\n")


def _export_base(pack: ClassifierPack, format: str, out: str | Path) -> dict[str, Any]:  # noqa: A002 - the word of the flag
    """The shared base alone: a backbone for `medlore finetune`, and what an expert's transfer is compared with."""
    if format != "safetensors":
        raise InputError(
            "--format", f"{format!r} for the shared base, which has no head", "safetensors", "name an expert, or take that format"
        )
    body: Any = merge(pack.network.body, None)
    with atomic_folder(out) as folder:
        write_backbone(folder, body, pack.manifest["preprocessing"])
        files = {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return {"format": format, "expert": BASE, "out": str(out), "files": files, "largest_difference": 0.0}


def write_backbone(folder: Path, body: Any, preprocessing: Mapping[str, Any]) -> None:
    """A transformers folder with the input that the network was trained on."""
    with quiet_transformers():
        body.save_pretrained(folder)
    size = {"height": preprocessing["image_size"], "width": preprocessing["image_size"]}
    steps = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True, "size": size}
    resample = _RESAMPLE[preprocessing["interpolation"]]
    values = {"image_mean": list(preprocessing["mean"]), "image_std": list(preprocessing["std"]), "resample": resample}
    write_json(folder / "preprocessor_config.json", {**steps, **values})


class _Logits(nn.Module):
    """Images in, a plain tensor of logits out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=pixel_values).logits
        return logits


def _write_safetensors(folder: Path, pack: ClassifierPack, network: Any, example: Tensor) -> Tensor:
    write_backbone(folder, network, pack.manifest["preprocessing"])
    again = type(network).from_pretrained(folder)
    with torch.no_grad():
        logits: Tensor = again.eval()(pixel_values=example).logits
    return logits


def _write_onnx(folder: Path, network: nn.Module, example: Tensor) -> Tensor:
    for package in EXTRAS["onnx"]:
        require(package, "--format onnx")
    import onnxruntime

    file = folder / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter speaks of its own internals
        torch.onnx.export(
            _Logits(network).eval(),
            (example,),
            file,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: batch}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"pixel_values": example.numpy()})[0]
    return torch.from_numpy(logits)


def _write_torch_export(folder: Path, network: nn.Module, example: Tensor) -> Tensor:
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(_Logits(network).eval(), (example,), dynamic_shapes={"pixel_values": {0: batch}})
    torch.export.save(program, folder / "model.pt2")
    with torch.no_grad():
        logits: Tensor = torch.export.load(folder / "model.pt2").module()(example)
    return logits


def _write_peft(folder: Path, pack: ClassifierPack, expert: str, example: Tensor) -> Tensor:
    """The shared base with the expert's head as a plain network, and the expert's factors as a PEFT adapter for it."""
    from peft import PeftModel

    base: Any = with_classifier(merge(pack.network.body, None), pack.network.heads[expert], pack.experts[expert])
    base.save_pretrained(folder / "base")
    save_peft(pack.network.body, expert, folder / "adapter")
    model = PeftModel.from_pretrained(type(base).from_pretrained(folder / "base"), str(folder / "adapter")).eval()
    with torch.no_grad():
        logits: Tensor = model(pixel_values=example).logits
    return logits


def _write_labels(folder: Path, pack: ClassifierPack, expert: str) -> None:
    entry = pack.experts[expert]
    labels = {"classes": list(entry.classes), "task": entry.kind, "preprocessing": pack.manifest["preprocessing"], "licence": entry.licence}
    write_json(folder / "labels.json", {"expert": expert, **labels, "metrics": entry.metrics})
