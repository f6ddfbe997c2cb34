"""What matters in a file of a run, for `same_results`: one flat mapping of names to texts and numbers.

Arrays (safetensors, npz, npy, pt, ONNX, torch.export) become a digest a tensor; NIfTI voxels and grid; DICOM pixels and what they are;
JSON, JSONL and CSV every value but the volatile ones; pictures their pixels; HTML its presence.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Values = dict[str, Any]

# Keys that no result depends on, wherever they stand.
VOLATILE = frozenset({
    "peak_memory_bytes", "versions", "git", "machine", "command", "waited", "hours_left", "generated", "date", "time",
})  # fmt: skip


class Places:
    """Folders of this record, which every text names by a word."""

    def __init__(self, places: Mapping[str, Path | str]) -> None:
        self._words = sorted(((str(path), f"<{word}>") for word, path in places.items() if str(path)), key=lambda pair: -len(pair[0]))

    def clean(self, text: str) -> str:
        """The text without this machine's folders."""
        for path, word in self._words:
            text = text.replace(path, word)
        return text


def values_of(path: Path, places: Places) -> Values:
    """Flat name -> value of one file; a reader that fails falls back to the bytes, and says so."""
    read = _READERS.get(_suffix(path.name), _bytes)
    try:
        return read(path, places)
    except Exception as error:  # a broken output is a finding, not the end of the record
        return {"unreadable": f"{type(error).__name__}: {places.clean(str(error))}", **_bytes(path, places)}


def json_values(content: Any, places: Places) -> Values:
    """A JSON value, flat, without its volatile keys."""
    found: Values = {}
    _flatten(content, "", found, places)
    return found


def _suffix(name: str) -> str:
    name = name.lower()
    if name.startswith("events.out.tfevents"):
        return ".html"
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def volatile(key: str) -> bool:
    """Whether a key holds times, versions and the like."""
    return key in VOLATILE or "seconds" in key


def _flatten(value: Any, name: str, found: Values, places: Places) -> None:
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if not volatile(str(key))}
        if not kept:
            found[name] = "{}"
        for key, part in kept.items():
            _flatten(part, f"{name}.{places.clean(str(key))}" if name else places.clean(str(key)), found, places)
    elif isinstance(value, list | tuple):
        if not value:
            found[name] = "[]"
        for number, part in enumerate(value):
            _flatten(part, f"{name}[{number}]", found, places)
    elif isinstance(value, str):
        found[name] = places.clean(value)
    elif value is None or isinstance(value, bool | int | float):
        found[name] = value
    else:
        found[name] = _tensor(value)


def array_digest(array: np.ndarray) -> str:
    """Type, shape and hash of an array, with its norm for people."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:20]
    norm = ""
    if array.dtype.kind in "fiub" and array.size:
        norm = f" norm {float(np.linalg.norm(array.astype(np.float64).ravel())):.9g}"
    return f"{array.dtype} {'x'.join(map(str, array.shape)) or 'scalar'} {digest}{norm}"


def _tensor(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        return f"bfloat16 {array_digest(value.float().numpy())}"
    return array_digest(value.numpy())


def _bytes(path: Path, _places: Places) -> Values:
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _presence(path: Path, _places: Places) -> Values:
    return {"there": path.stat().st_size > 0}


def _json(path: Path, places: Places) -> Values:
    return json_values(json.loads(path.read_text(encoding="utf-8")), places)


def _json_lines(path: Path, places: Places) -> Values:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return json_values(lines, places)


def _csv(path: Path, places: Places) -> Values:
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    return json_values(rows, places)


def _text(path: Path, places: Places) -> Values:
    return {f"line {n}": places.clean(line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)}


def _safetensors(path: Path, places: Places) -> Values:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        found = {name: _tensor(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        notes = opened.metadata() or {}
    return found | {f"metadata {key}": places.clean(value) for key, value in notes.items()}


def _numpy(path: Path, _places: Places) -> Values:
    loaded = np.load(path, allow_pickle=False)
    return (
        {"array": array_digest(loaded)} if isinstance(loaded, np.ndarray) else {name: array_digest(loaded[name]) for name in loaded.files}
    )


def _torch(path: Path, places: Places) -> Values:
    import torch

    return json_values(torch.load(path, map_location="cpu", weights_only=True), places)


def _torch_export(path: Path, _places: Places) -> Values:
    import torch

    program = torch.export.load(path)
    found = {name: _tensor(value) for name, value in program.state_dict.items()}
    return found | {"operations": json.dumps([str(node.target) for node in program.graph.nodes if node.op == "call_function"])}


def _onnx(path: Path, _places: Places) -> Values:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    found = {weight.name: array_digest(numpy_helper.to_array(weight)) for weight in graph.initializer}
    return found | {"operations": json.dumps([node.op_type for node in graph.node])}


def _nifti(path: Path, places: Places) -> Values:
    import nibabel

    image: Any = nibabel.load(path)
    header = image.header
    found: Values = {
        "voxels": array_digest(np.asanyarray(image.dataobj)),
        "stored type": str(image.get_data_dtype()),
        "affine": json.dumps(image.affine.tolist()),
        "codes": [int(header["sform_code"]), int(header["qform_code"])],
        "spacing": [float(size) for size in header.get_zooms()],
        "units": list(header.get_xyzt_units()),
        "description": str(header["descrip"].item()),
    }
    texts = [places.clean(part.get_content().decode("utf-8", "replace").rstrip("\0")) for part in header.extensions]
    return json_values({**found, "extensions": texts}, places)


def _dicom(path: Path, _places: Places) -> Values:
    import pydicom

    data = pydicom.dcmread(path)
    words = ("Modality", "SOPClassUID", "Rows", "Columns", "NumberOfFrames", "SegmentationType", "SeriesDescription", "Manufacturer")
    found: Values = {word: str(data.get(word, "")) for word in words}
    found["pixels"] = hashlib.sha256(data.get("PixelData", b"")).hexdigest()
    for number, segment in enumerate(data.get("SegmentSequence", ())):
        found[f"segment {number}"] = f"{segment.SegmentLabel}, {segment.SegmentAlgorithmType}"
    for number, frame in enumerate(data.get("PerFrameFunctionalGroupsSequence", ())):
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        found[f"frame {number}"] = f"{frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber} at {[float(x) for x in place]}"
    return found


def _picture(path: Path, _places: Places) -> Values:
    from PIL import Image

    with Image.open(path) as image:
        return {"pixels": array_digest(np.asarray(image))}


_READERS: dict[str, Callable[[Path, Places], Values]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".md": _text,
    ".txt": _text,
    ".yaml": _text,
    ".safetensors": _safetensors,
    ".npz": _numpy,
    ".npy": _numpy,
    ".pt": _torch,
    ".pt2": _torch_export,
    ".onnx": _onnx,
    ".nii": _nifti,
    ".nii.gz": _nifti,
    ".dcm": _dicom,
    ".png": _picture,
    ".html": _presence,
}
