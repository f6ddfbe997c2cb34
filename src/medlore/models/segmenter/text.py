"""Prompt -> embedding: BioLORD (an MPNet) with SAT's projection and modality table, from the 204 weights of the published file.

The file holds no words: the wordpiece list (`vocab.txt` of BioLORD-2023-C or of any MPNet, 30527 lines) must be given. That
of `bert-base-uncased` (30522 lines) is accepted too: MPNet's list is the same with four entries in front and one behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from medlore.errors import CheckpointError, InputError
from medlore.files import existing_file, sha256_of
from medlore.models.segmenter.checkpoints import bare_name, recognise
from medlore.models.segmenter.vocabulary import canonical_modality
from medlore.models.statefile import State, read_state

MAX_TOKENS, LORKD_TOKENS = 256, 64  # of a prompt with its marks: SAT's; LoRKD builds the same tower with a text length of 64
_NORM_EPSILON = 1e-5  # of MPNet and BioLORD; transformers' default for MPNet is another
# The published embeddings were made with the words [CLS] and [SEP] looked up in MPNet's list, where they are ordinary entries,
# and with 0 for padding; MPNet's own marks (0, 1, 2) are not used. Repeating that is what makes the embeddings agree.
PAD, UNKNOWN, FIRST, LAST = 0, 104, 105, 106
_SHIFT_OF_BERT = 4
_BERT_WORDS = {"[UNK]": UNKNOWN - _SHIFT_OF_BERT, "[CLS]": FIRST - _SHIFT_OF_BERT, "[SEP]": LAST - _SHIFT_OF_BERT}
_MPNET_WORDS = {"[UNK]": UNKNOWN, "[CLS]": FIRST, "[SEP]": LAST}

_TOWER = "text_tower.biolord."
_MODALITY_ROW = {"ct": 0, "mri": 1, "us": 2, "pet": 3}


class Wordpieces(Protocol):
    """Text -> ids of its wordpieces in MPNet's list, without any marks."""

    def __call__(self, text: str) -> list[int]:
        """Ids of one prompt."""

    def fits(self, rows: int) -> bool:
        """Whether the list belongs to a word table of so many rows."""


def read_wordpieces(path: str | Path) -> Wordpieces:
    """The tokenizer of a `vocab.txt`, a `tokenizer.json`, or a folder that holds one of them.

    Raises:
        InputError: no such file.
        CheckpointError: not a wordpiece list of MPNet or BERT.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / n for n in ("vocab.txt", "tokenizer.json") if (path / n).is_file()), path / "vocab.txt")
        path = existing_file(found, where="--tokenizer")
    path = existing_file(path, where="--tokenizer")
    words = _words_of_json(path) if path.suffix == ".json" else _words_of_text(path)
    return _WordpieceTokenizer(words, where=str(path))


class _WordpieceTokenizer:
    def __init__(self, words: dict[str, int], *, where: str) -> None:
        from tokenizers import BertWordPieceTokenizer

        marks = {word: words.get(word) for word in _MPNET_WORDS}
        if marks == _MPNET_WORDS:
            self._shift = 0
        elif marks == _BERT_WORDS:
            self._shift = _SHIFT_OF_BERT
        else:
            raise CheckpointError(
                where,
                f"{len(words)} words with [UNK], [CLS], [SEP] at {list(marks.values())}",
                "MPNet's list (104, 105, 106) or that of bert-base-uncased (100, 101, 102)",
                "use vocab.txt of BioLORD-2023-C, all-mpnet-base-v2 or bert-base-uncased",
            )
        self._words = len(words)
        self._tokenizer = BertWordPieceTokenizer(vocab=words, lowercase=True)

    def fits(self, rows: int) -> bool:
        """MPNet's list may lack its last entry, <mask>; BERT's lacks five. Other lists of BERT's kind have other lengths."""
        return rows - self._words in ((0, 1) if self._shift == 0 else (_SHIFT_OF_BERT + 1,))

    def __call__(self, text: str) -> list[int]:
        # Without the post-processor: the marks are ours to add.
        return [index + self._shift for index in self._tokenizer.encode(text, add_special_tokens=False).ids]


def _words_of_text(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(str(path), "not UTF-8 text", "one wordpiece a line", "name vocab.txt or tokenizer.json") from error
    lines = lines[:-1] if lines and not lines[-1] else lines
    return {word.rstrip("\r"): index for index, word in enumerate(lines)}


def _words_of_json(path: Path) -> dict[str, int]:
    from medlore.files import read_json

    content = read_json(path)
    words = content.get("model", {}).get("vocab") if isinstance(content, dict) else None
    if not isinstance(words, dict):
        raise CheckpointError(str(path), "no `model.vocab`", "a tokenizer.json of a wordpiece model", "name vocab.txt instead")
    if not all(isinstance(index, int) for index in words.values()):
        raise CheckpointError(str(path), "ids in `model.vocab` that are no whole numbers", "word: number", "fetch tokenizer.json again")
    return {str(word): int(index) for word, index in words.items()}


def prompt_ids(pieces: Sequence[int], *, most: int = MAX_TOKENS) -> list[int]:
    """Ids of one prompt with its marks, at most `most`; a longer one loses its tail, not its end mark.

    Examples:
        >>> prompt_ids([11, 12])
        [105, 11, 12, 106]
    """
    ids = [FIRST, *pieces, LAST]
    return ids if len(ids) <= most else [*ids[: most - 1], LAST]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (n, longest), padded with 0, and their mask (ids > 0)."""
    longest = max((len(ids) for ids in prompts), default=0)
    ids = torch.tensor([[*p, *([PAD] * (longest - len(p)))] for p in prompts], dtype=torch.long).view(len(prompts), longest)
    return ids, ids > 0


class TextEncoder(nn.Module):
    """BioLORD, mean over the words, projection, plus the embedding of the modality.

    Args:
        state: canonical weights (`text_tower.biolord.*`, `projection_layer.*`, `modality_embed.weight`); their shapes give all sizes.
        wordpieces: the tokenizer; None if only ids are embedded.
        sha256: hash of the file, for binding.
        max_tokens: where prompts are cut: 256 for SAT, 64 for LoRKD.

    Raises:
        CheckpointError: missing, unexpected or misshapen weights.
    """

    def __init__(
        self, state: State, *, wordpieces: Wordpieces | None = None, sha256: str | None = None, max_tokens: int = MAX_TOKENS
    ) -> None:
        from transformers import MPNetModel

        super().__init__()
        self.max_tokens = max_tokens
        self.wordpieces, self.sha256 = wordpieces, sha256
        with torch.device("meta"):
            self.tower = MPNetModel(_tower_config(state))
            width = state["projection_layer.2.weight"].shape[0]
            hidden, inputs = state["projection_layer.0.weight"].shape
            self.projection_layer = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, width))
            self.modality_embed = nn.Embedding(*state["modality_embed.weight"].shape)
        self._load(state)
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return int(self.modality_embed.weight.shape[1])

    @torch.no_grad()
    def embed_ids(self, ids: Tensor, mask: Tensor, modality: str) -> Tensor:
        """Token ids and mask (n, t) -> embeddings (n, width)."""
        hidden = self.tower(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # n t width
        weight = mask[..., None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        row = self.modality_embed.weight[_MODALITY_ROW[canonical_modality(modality)]]
        return cast("Tensor", self.projection_layer(pooled)) + row

    def embed(self, labels: Sequence[str], modality: str, *, batch_size: int = 64) -> Tensor:
        """Prompts -> embeddings (n, width); labels are lower-cased first.

        Raises:
            InputError: no wordpiece list was given.
        """
        if self.wordpieces is None:
            raise InputError(
                "text encoder",
                "no wordpiece list",
                "vocab.txt of BioLORD-2023-C, all-mpnet-base-v2 or bert-base-uncased",
                "give --tokenizer FILE_OR_FOLDER",
            )
        parts = []
        for start in range(0, len(labels), batch_size):
            ids, mask = padded(
                [prompt_ids(self.wordpieces(label.lower()), most=self.max_tokens) for label in labels[start : start + batch_size]]
            )
            parts.append(self.embed_ids(ids, mask, modality))
        embeddings = torch.cat(parts) if parts else torch.zeros(0, self.width)
        if not bool(torch.isfinite(embeddings).all()):
            raise CheckpointError("text encoder", "embeddings that are not finite", "finite weights", "fetch the file again")
        return embeddings

    def _load(self, state: State) -> None:
        """Assign every weight, and say at once what is missing, unexpected or misshapen."""
        own = {name: tuple(w.shape) for name, w in self.state_dict().items()}
        given = {name.replace(_TOWER, "tower."): tensor.float() for name, tensor in state.items() if not name.endswith("position_ids")}
        faults = [f"missing: {name} {shape}" for name, shape in own.items() if name not in given]
        faults += [f"unexpected: {name}" for name in given if name not in own]
        faults += [
            f"misshapen: {n} {tuple(w.shape)}, should be {own[n]}" for n, w in given.items() if n in own and tuple(w.shape) != own[n]
        ]
        faults += [f"not finite: {name}" for name, w in given.items() if not bool(torch.isfinite(w).all())]
        if faults:
            raise CheckpointError(
                "text encoder",
                f"fits only in part ({len(faults)} faults)",
                "SAT's text encoder on BioLORD",
                "fetch the file again",
                faults=faults,
            )
        self.load_state_dict(given, assign=True)
        for module in self.modules():  # ids of positions are counted, not stored
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, name, torch.arange(buffer.numel()).view(buffer.shape))


def read_text_encoder(path: str | Path, *, tokenizer: str | Path | None = None) -> TextEncoder:
    """The published text-encoder file.

    Args:
        path: .pth or .safetensors with the 204 keys.
        tokenizer: `vocab.txt`, `tokenizer.json`, or a folder with one of them.

    Raises:
        InputError: no such file.
        CheckpointError: another kind of file, another text tower, or one that fits only in part.
    """
    path = Path(path)
    state = {bare_name(name): tensor for name, tensor in read_state(path).items()}
    if recognise(state) != "text encoder" or not any(name.startswith(_TOWER) for name in state):
        raise CheckpointError(
            str(path),
            f"{len(state)} weights such as {next(iter(state))!r}",
            "SAT's text encoder on BioLORD (`text_tower.biolord.*`)",
            "name the text encoder's file; MedCPT and plain BERT towers are not supported",
        )
    state = {name: tensor for name, tensor in state.items() if "atlas_tower" not in name and "temperature" not in name}
    wordpieces = read_wordpieces(tokenizer) if tokenizer is not None else None
    rows = state.get(f"{_TOWER}embeddings.word_embeddings.weight", torch.zeros(0, 1)).shape[0]
    if wordpieces is not None and not wordpieces.fits(rows):
        raise CheckpointError(
            f"--tokenizer {tokenizer}",
            f"a word list that does not belong to {rows} word embeddings",
            f"MPNet's list ({rows} lines) or that of bert-base-uncased ({rows - _SHIFT_OF_BERT - 1} lines)",
            "use vocab.txt of BioLORD-2023-C, all-mpnet-base-v2 or bert-base-uncased",
        )
    try:
        return TextEncoder(state, wordpieces=wordpieces, sha256=sha256_of(path))
    except (CheckpointError, KeyError) as error:
        if isinstance(error, KeyError):
            raise CheckpointError(str(path), f"missing {error}", "SAT's text encoder, whole", "fetch the file again") from error
        raise error.at(str(path)) from error


def _tower_config(state: State) -> Any:
    """MPNet's configuration, inferred from the shapes."""
    from transformers import MPNetConfig

    words, width = state[f"{_TOWER}embeddings.word_embeddings.weight"].shape
    buckets, heads = state[f"{_TOWER}encoder.relative_attention_bias.weight"].shape
    layers = {name.split(".layer.")[1].split(".")[0] for name in state if name.startswith(_TOWER) and ".layer." in name}
    return MPNetConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        intermediate_size=state[f"{_TOWER}encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=state[f"{_TOWER}embeddings.position_embeddings.weight"].shape[0],
        relative_attention_num_buckets=buckets,
        layer_norm_eps=_NORM_EPSILON,
    )
