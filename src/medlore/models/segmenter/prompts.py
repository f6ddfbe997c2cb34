"""Embeddings of prompts, computed once: deployment then needs no text model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medlore.errors import CheckpointError, UnknownNameError
from medlore.files import atomic_path, existing_file
from medlore.models.segmenter.vocabulary import canonical_modality
from medlore.models.statefile import read_state

SCHEMA = "medlore/prompts/1"
_TENSOR = "embeddings"


@dataclass(frozen=True)
class PromptTable:
    """Prompt -> embedding.

    Attributes:
        keys: `modality/label`, one a row, all different.
        embeddings: (n, width), float32.
        text_sha256: hash of the text encoder's file that made them; None when it is not known.
    """

    keys: tuple[str, ...]
    embeddings: Tensor
    text_sha256: str | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.embeddings.dim() != 2 or len(self.keys) != self.embeddings.shape[0]:
            faults.append(f"{len(self.keys)} prompts and embeddings of shape {tuple(self.embeddings.shape)}")
        if len(set(self.keys)) != len(self.keys):
            faults.append("prompts that come twice")
        wrong = [key for key in self.keys if key.count("/") < 1 or key.split("/")[0] not in ("ct", "mri", "us", "pet")]
        faults += [f"prompt {key!r} is not `modality/label`" for key in wrong]
        if not bool(self.embeddings.isfinite().all()):
            faults.append("numbers that are not finite")
        if faults:
            raise CheckpointError(
                "prompt embeddings",
                f"{len(faults)} fault(s)",
                "one finite row for each `modality/label`",
                "make the table again",
                faults=faults,
            )

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.embeddings.shape[1]

    def labels(self, modality: str) -> list[str]:
        """Labels of one modality, in the order of the table."""
        prefix = canonical_modality(modality) + "/"
        return [key.removeprefix(prefix) for key in self.keys if key.startswith(prefix)]

    def queries(self, labels: Sequence[str], modality: str) -> Tensor:
        """Embeddings (n, width) of labels in the table's own spelling.

        Raises:
            UnknownNameError: a label is not in the table; the nearest three are named.
        """
        rows = {key: row for row, key in enumerate(self.keys)}
        modality = canonical_modality(modality)
        for label in labels:
            if f"{modality}/{label}" not in rows:
                fix = "use one of them, or give the text encoder so that any prompt can be embedded"
                raise UnknownNameError(f"prompt embeddings ({modality})", label, self.labels(modality), fix)
        return self.embeddings[[rows[f"{modality}/{label}"] for label in labels]]

    def write(self, path: str | Path) -> Path:
        """One safetensors file; the prompts are in its header."""
        from safetensors.torch import save_file

        header = {"prompts": json.dumps(list(self.keys)), "schema": SCHEMA}
        if self.text_sha256:
            header["text_sha256"] = self.text_sha256
        with atomic_path(path) as temporary:
            save_file({_TENSOR: self.embeddings.contiguous()}, temporary, metadata=header)
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> PromptTable:
        """A table in one of three forms.

        Our own safetensors; any weights file whose tensors are named by their prompt (`ct/liver` or, as SAT's lists write
        it, `ct_liver`), each of shape (width,) or (1, width); an `.npz` with `prompts` and `embeddings`.

        Raises:
            InputError: no such file.
            CheckpointError: none of these forms, or a table with faults.
        """
        path = existing_file(path)
        try:
            return _read_npz(path) if path.suffix.lower() == ".npz" else _read_tensors(path)
        except CheckpointError as error:
            raise (error if str(path) in error.where else error.at(str(path))) from error


def _read_npz(path: Path) -> PromptTable:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            prompts, embeddings = [str(p) for p in stored["prompts"]], torch.from_numpy(stored["embeddings"]).float()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            str(path), f"{type(error).__name__}: {error}", "arrays `prompts` (text) and `embeddings`", "save both"
        ) from error
    return PromptTable(tuple(_key(p) for p in prompts), embeddings)


def _read_tensors(path: Path) -> PromptTable:
    state, header = read_state(path), _header(path)
    if _TENSOR in state and "prompts" in header:
        try:
            keys = json.loads(header["prompts"])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                str(path), "prompts that are not JSON in its header", "a list of prompts", "make the table again"
            ) from error
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(str(path), "prompts of another kind in its header", "a list of prompts", "make the table again")
        return PromptTable(tuple(keys), state[_TENSOR].float(), header.get("text_sha256"))
    widths = {tensor.numel() for tensor in state.values()}
    if len(widths) != 1:
        raise CheckpointError(
            str(path),
            f"{len(state)} tensors of {len(widths)} sizes",
            "one embedding of the same width for each prompt",
            "make the table again",
        )
    return PromptTable(tuple(_key(p) for p in state), torch.stack([t.float().reshape(-1) for t in state.values()]))


def _header(path: Path) -> Mapping[str, str]:
    if path.suffix.lower() != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def _key(prompt: str) -> str:
    """`ct/liver` from `ct/liver` or `ct_liver`."""
    return prompt.replace("_", "/", 1) if "/" not in prompt.split("_", 1)[0] else prompt


def is_prompt_table(path: str | Path) -> bool:
    """Whether a file is a table of our own form."""
    path = Path(path)
    return path.is_file() and path.suffix.lower() == ".safetensors" and _header(path).get("schema") == SCHEMA


def table_of(embeddings: Iterable[tuple[str, Tensor]], *, text_sha256: str | None = None) -> PromptTable:
    """A table from pairs of key and embedding (width,)."""
    keys, rows = zip(*embeddings, strict=True)
    return PromptTable(tuple(keys), torch.stack(rows), text_sha256)
