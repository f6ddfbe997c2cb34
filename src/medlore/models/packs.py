"""Folders of weights that say what they are: a manifest and safetensors files, bound by hashes.

::

    PACK/
    ├── manifest.json             schema medlore/expert-pack/2, kind, name, sizes, experts, prompts, preprocessing, hashes, licence
    ├── base.safetensors          the shared base, or one merged expert
    ├── experts/NAME.safetensors  factor pairs of one region: TARGET.lora_A, TARGET.lora_B
    └── prompts.safetensors       embeddings of the vocabulary

The number at the end of the schema is the format. A classifier's factors were scaled by position in format 1 and are scaled by name
since format 2; a reader knows the formats from `OLDEST` to `FORMAT` and says of any other which version made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from medlore.errors import CheckpointError, DataError, UnknownNameError
from medlore.files import atomic_folder, read_json, sha256_of, write_json
from medlore.models import pack_names
from medlore.models.segmenter.manifest import segmenter_faults
from medlore.models.statefile import State, read_state

MANIFEST, BASE = pack_names.MANIFEST, pack_names.BASE
_FAMILY = "medlore/expert-pack/"
OLDEST, FORMAT = 1, 2
SCHEMA = f"{_FAMILY}{FORMAT}"
OLDER_FIX = "make it again with the study (`medlore decompose`), or export the published file again"

_NEEDED: dict[str, dict[str, type]] = {
    "classifier": {"student": dict, "preprocessing": dict, "layout": str, "experts": dict, "files": dict},
    "segmenter": {"config": dict, "preprocessing": dict, "form": str, "experts": dict, "files": dict, "name": str, "parameters": int},
}


def is_pack(path: str | Path) -> bool:
    """Whether a path is a folder with a manifest."""
    return (Path(path) / MANIFEST).is_file()


def write_pack(path: str | Path, manifest: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a whole pack or nothing; `manifest["files"]` gets the hash of every file.

    Args:
        path: the folder; replaced if it is there.
        manifest: JSON values.
        tensors: file name -> name -> tensor.
    """
    from safetensors.torch import save_file

    with atomic_folder(path) as folder:
        files = {}
        for name, state in tensors.items():
            (folder / name).parent.mkdir(exist_ok=True)
            save_file({key: tensor.detach().contiguous() for key, tensor in state.items()}, folder / name)
            files[name] = sha256_of(folder / name)
        write_json(folder / MANIFEST, {**manifest, "files": files})
    return Path(path)


def read_manifest(path: str | Path, *, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a pack.

    Args:
        path: the folder.
        kind: `segmenter` or `classifier`; None for either.

    Raises:
        CheckpointError: no pack, one of another kind or version, or a manifest that lacks entries.
    """
    if not is_pack(path):
        raise CheckpointError(str(path), f"no {MANIFEST}", "a pack folder", "name the folder that `medlore export` wrote")
    place = Path(path) / MANIFEST
    try:
        manifest = read_json(place)
    except DataError as error:
        raise CheckpointError(error.where, error.came, error.accepted, "export the pack again") from error
    found = manifest if isinstance(manifest, dict) else {}
    _check_format(place, found.get("schema"))
    named = str(found.get("kind"))
    if named not in _NEEDED:
        raise UnknownNameError(f"{place}: kind", named, _NEEDED, "make or fetch the pack again")
    if kind is not None and named != kind:
        raise CheckpointError(str(place), f"a pack of a {named}", f"a pack of a {kind}", "use the verb for that kind of pack")
    faults = [
        f"{name}: {'missing' if name not in found else 'of a wrong kind'}"
        for name, k in _NEEDED[named].items()
        if not isinstance(found.get(name), k) or isinstance(found[name], bool)
    ]
    if not faults:
        faults = _file_faults(found["files"]) + (segmenter_faults(found) if named == "segmenter" else [])
    if faults:
        raise CheckpointError(str(place), f"{len(faults)} fault(s)", "a whole manifest", "copy or export the pack again", faults=faults)
    return found


def format_of(manifest: Mapping[str, Any]) -> int:
    """The format of a manifest that `read_manifest` has read."""
    return int(str(manifest["schema"]).removeprefix(_FAMILY))


def older(place: str | Path, why: str) -> CheckpointError:
    """What is said of a pack that this version cannot read any more."""
    return CheckpointError(
        str(place),
        f"made by an older version of MedLoRE ({why})",
        f"a pack of format {OLDEST} to {FORMAT} as this version reads it",
        OLDER_FIX,
    )


def strangers(path: str | Path, manifest: Mapping[str, Any]) -> list[str]:
    """Weights that lie in a pack's folder and that its manifest does not name; nothing reads them."""
    there = (file.relative_to(path).as_posix() for file in Path(path).rglob("*.safetensors"))
    return sorted(name for name in there if name not in manifest["files"])


def _check_format(place: Path, schema: Any) -> None:
    number = schema.removeprefix(_FAMILY) if isinstance(schema, str) and schema.startswith(_FAMILY) else ""
    if not (number.isascii() and number.isdigit() and len(number) < 6):
        raise CheckpointError(str(place), f"schema {schema!r}", repr(SCHEMA), "name a pack, or export it with this version")
    if int(number) > FORMAT:
        came, known = f"schema {schema!r}, of a newer version of MedLoRE", f"formats {OLDEST} to {FORMAT}"
        raise CheckpointError(str(place), came, known, "update medlore (pip install -U medlore), or make the pack with this version")
    if int(number) < OLDEST:
        raise older(place, f"schema {schema!r}")


def _file_faults(files: Mapping[str, Any]) -> list[str]:
    faults = [f"files: {name!r} has {digest!r} for a SHA-256" for name, digest in files.items() if not isinstance(digest, str)]
    faults += [
        f"files: {name!r} lies outside the pack" for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    ]
    return faults + ([f"files: no {BASE}"] if BASE not in files else [])


def read_pack_file(path: str | Path, manifest: Mapping[str, Any], name: str, *, verify: bool = True) -> State:
    """Tensors of one file of a pack.

    Args:
        path: the pack.
        manifest: its manifest.
        name: file name.
        verify: compare the file's hash with the manifest's.

    Raises:
        CheckpointError: the file is not in the pack, or is not the one that the manifest names.
    """
    place = Path(path) / name
    if not place.resolve().is_relative_to(Path(path).resolve()):
        raise CheckpointError(str(place), "lies outside the pack", "files inside it", "fetch the pack from where it was made")
    if not place.is_file():
        raise CheckpointError(str(place), "is not in the pack", "every file that the manifest names", "copy or export the pack again")
    wanted = manifest.get("files", {}).get(name)
    if verify and sha256_of(place) != wanted:
        raise CheckpointError(
            str(place), "is not the file that was exported (its hash differs)", f"sha256 {wanted}", "copy or export the pack again"
        )
    return read_state(place)
