"""Folders of weights that say what they are: a manifest and safetensors files, bound by hashes.

::

    PACK/
    ├── manifest.json             schema medlore/expert-pack/1, kind, name, sizes, experts, prompts, preprocessing, hashes, licence
    ├── base.safetensors          the shared base, or one merged expert
    ├── experts/NAME.safetensors  factor pairs of one region: TARGET.lora_A, TARGET.lora_B
    └── prompts.safetensors       embeddings of the vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from medlore.errors import CheckpointError, DataError
from medlore.files import atomic_folder, read_json, sha256_of, write_json
from medlore.models.statefile import State, read_state

MANIFEST = "manifest.json"
SCHEMA = "medlore/expert-pack/1"


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
    if found.get("schema") != SCHEMA:
        raise CheckpointError(str(place), f"schema {found.get('schema')!r}", repr(SCHEMA), "export the pack with this version")
    if kind is not None and found.get("kind") != kind:
        raise CheckpointError(str(place), f"a pack of a {found.get('kind')}", f"a pack of a {kind}", "use the verb for that kind of pack")
    needed = _NEEDED.get(str(found.get("kind")), {})
    faults = [
        f"{name}: {'missing' if name not in found else 'of a wrong kind'}"
        for name, k in needed.items()
        if not isinstance(found.get(name), k)
    ]
    if faults:
        raise CheckpointError(str(place), f"{len(faults)} fault(s)", "a whole manifest", "copy or export the pack again", faults=faults)
    return found


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
