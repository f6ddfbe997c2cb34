"""A segmenter ready for use: shared base, experts merged on demand, prompts, preprocessing, hashes."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medlore.assets import PREFIX, asset_path
from medlore.errors import CheckpointError, InputError, UnknownNameError
from medlore.files import sha256_of
from medlore.models import packs
from medlore.models.segmenter.checkpoints import Expert, SegmenterWeights, expected_shapes, read_segmenter
from medlore.models.segmenter.fit import expert_faults, misfits, not_finite, refuse_sizes
from medlore.models.segmenter.network import Segmenter, SegmenterConfig
from medlore.models.segmenter.prompts import PromptTable
from medlore.models.segmenter.text import LORKD_TOKENS, TextEncoder, read_text_encoder
from medlore.models.segmenter.vocabulary import MODALITIES, REGIONS, WHOLE_BODY
from medlore.models.statefile import State

KIND = "segmenter"
BASE_FILE, PROMPTS_FILE = packs.BASE, "prompts.safetensors"
_MERGED_BYTES = 2 << 30

# How SAT and LoRKD prepare a volume; a pack of another training carries its own values.
PUBLISHED_PREPROCESSING: dict[str, Any] = {
    "orientation": "RAS",
    "spacing_mm": [1.0, 1.0, 3.0],
    "roi_size": [288, 288, 96],
    "overlap": 0.5,
    "foreground_above": 0.0,
    "intensity": {"ct": {"clip": [-500.0, 1000.0]}, "other": {"clip_percentiles": [0.5, 99.5]}, "then": "z-score"},
    "gaussian_sigma": 0.125,
    "threshold": 0.5,
}


class UnboundPairWarning(UserWarning):
    """Vision weights and prompt embeddings that no pack has bound: a pair that does not belong together gives garbage silently."""


class SegmenterBundle:
    """What `load_segmenter` returns. The base is never changed; networks share every tensor that an expert leaves alone.

    Attributes:
        weights: base and experts.
        prompts: embeddings of known prompts; None if there is a text encoder only.
        text: text encoder; None if there is a table only.
        preprocessing: constants of the training.
        region: the region of a merged expert; None for a model of all regions.
        absent: experts that the pack's manifest names and that are not there: region -> reason.
        notes: what a user should know of how the files were read.
        source: the file or folder.
    """

    def __init__(
        self,
        weights: SegmenterWeights,
        *,
        source: Path,
        prompts: PromptTable | None = None,
        text: TextEncoder | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        region: str | None = None,
        absent: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.weights, self.source, self.prompts, self.text = weights, source, prompts, text
        self.preprocessing = dict(preprocessing or PUBLISHED_PREPROCESSING)
        self.region, self.absent, self.notes = region, dict(absent or {}), tuple(notes)
        self._networks: OrderedDict[str | None, Segmenter] = OrderedDict()

    @property
    def config(self) -> SegmenterConfig:
        """Sizes of the network."""
        return self.weights.config

    @property
    def name(self) -> str:
        """`LoRKD-Nano`, `SAT-Pro`, ..."""
        return self.weights.name if self.region is None else f"{self.weights.name} merged for {self.region}"

    @property
    def regions(self) -> tuple[str, ...]:
        """Regions that this model answers for: its experts, the one merged region, or all regions for a plain SAT."""
        return tuple(self.weights.experts) or ((self.region,) if self.region else REGIONS)

    @property
    def ranks(self) -> dict[str, int]:
        """Region -> rank of its expert; empty for a model without experts."""
        return {region: self.weights.rank_of(region) for region in self.weights.experts}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities for which there are prompts."""
        if self.text is not None or self.prompts is None:
            return MODALITIES
        return tuple(m for m in MODALITIES if self.prompts.labels(m))

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the weights file, or of the pack's manifest, which holds the hashes of its files."""
        return sha256_of(self.source / packs.MANIFEST if self.source.is_dir() else self.source)

    def network(self, region: str | None = None) -> Segmenter:
        """The plain network of one region, in eval mode on the CPU; merged on first use and kept.

        A plain SAT has one network for all regions. `whole body` and None mean the shared base of a model with experts.
        Least recently used merged weights are let go above 2 GiB.

        Raises:
            CheckpointError: there is no expert for that region.
        """
        key = self._expert_of(region)
        if key not in self._networks:
            self._networks[key] = _plain_network(self.config, self.weights.merged(key))
        self._networks.move_to_end(key)
        while len(self._networks) > 1 and self._merged_bytes() > _MERGED_BYTES:
            self._networks.popitem(last=False)
        return self._networks[key]

    def queries(self, labels: Sequence[str], modality: str) -> Tensor:
        """Embeddings (n, width) of prompts: from the table where it has them, else from the text encoder.

        Raises:
            UnknownNameError: a prompt that is not in the table, and no text encoder.
            InputError: neither table nor text encoder, or no wordpiece list.
        """
        if self.prompts is not None:
            try:
                return self.prompts.queries(labels, modality)
            except UnknownNameError:
                if self.text is None:
                    raise
        if self.text is not None:
            return self.text.embed(labels, modality)
        raise InputError(
            str(self.source),
            "no prompt embeddings",
            "a pack with them, a table, or a text encoder",
            "export a pack with --text, or give --prompt-embeddings FILE",
        )

    def _expert_of(self, region: str | None) -> str | None:
        if region is None or (region == WHOLE_BODY and self.region is None):
            return None
        if region not in self.regions:
            fix = "load the file or pack that holds all experts" if self.region else "choose one of its regions, or leave the region out"
            came = f"no expert for {region!r}" + (f" ({self.absent[region]})" if region in self.absent else "")
            raise CheckpointError(str(self.source), came, f"one of {', '.join(self.regions)}", fix)
        return region if region in self.weights.experts else None

    def _merged_bytes(self) -> int:
        """Memory of the weights that are not the base's own."""
        adapted = {t for e in self.weights.experts.values() for t in e.pairs}
        one = sum(self.weights.base[f"{t}.weight"].numel() * 4 for t in adapted)
        return one * sum(key is not None for key in self._networks)


def load_segmenter(
    path: str | Path,
    *,
    expert: str | None = None,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prompt_embeddings: str | Path | None = None,
    lora_alpha: float | None = None,
    verify: bool = True,
) -> SegmenterBundle:
    """A pack, or a published SAT or LoRKD file, ready for use.

    Args:
        path: pack folder, .pth or .safetensors, or a shipped pack (`medlore:NAME`).
        expert: only this region's expert is kept.
        text: the published text encoder's file, for prompts outside a table.
        tokenizer: wordpiece list for it.
        prompt_embeddings: a table of prompts instead of a text encoder.
        lora_alpha: alpha of a published file with equal ranks (it does not say); 16 by default.
        verify: check the hashes of a pack.

    Raises:
        InputError: no such file; an alpha that the file cannot have.
        CheckpointError: broken, foreign or partial weights, or prompts of another width.

    Warns:
        UnboundPairWarning: vision weights and prompts that no pack has bound together.
    """
    path = asset_path(str(path)) if str(path).startswith(PREFIX) else Path(path)
    encoder = read_text_encoder(text, tokenizer=tokenizer) if text is not None else None
    table = PromptTable.read(prompt_embeddings) if prompt_embeddings is not None else None
    if path.is_dir():
        bundle, bound_to = _load_pack(path, table, encoder, verify=verify)
        if lora_alpha is not None:
            raise InputError("--lora-alpha", "given for a pack", "no alpha: a pack knows its scalings", "leave it out")
    else:
        weights = read_segmenter(path, lora_alpha=lora_alpha)
        bundle, bound_to = SegmenterBundle(weights, source=path, prompts=table, text=encoder, notes=_scaling_notes(weights)), None
    _check_width(bundle)
    if encoder is not None and (bundle.weights.experts or bundle.region is not None):  # LoRKD's, or one merged out of it
        encoder.max_tokens = LORKD_TOKENS
    if expert is not None:
        _keep(bundle, expert)
    _warn_unbound(bundle, [given.sha256 for given in (encoder,) if given] + [given.text_sha256 for given in (table,) if given], bound_to)
    return bundle


def write_segmenter_pack(
    path: str | Path,
    weights: SegmenterWeights,
    *,
    prompts: PromptTable | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    region: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pack: base, experts, prompts and what is needed to use them.

    Args:
        path: the folder.
        weights: base and experts; a merged expert has none.
        prompts: table bound to these weights from now on.
        preprocessing: constants of the training; the published ones by default.
        region: the region of a merged expert.
        about: further JSON values (source file and hash, licence, training).
    """
    experts = {}
    tensors: dict[str, Mapping[str, Tensor]] = {BASE_FILE: weights.base}
    for name, expert in weights.experts.items():
        file = f"experts/{name.replace(' ', '-')}.safetensors"
        pairs = {f"{t}.lora_{side}": factor for t, pair in expert.pairs.items() for side, factor in zip("AB", pair, strict=True)}
        tensors[file] = pairs
        experts[name] = {"file": file, "rank": weights.rank_of(name), "layout": expert.layout, "scaling": dict(expert.scaling)}
    if prompts is not None:
        tensors[PROMPTS_FILE] = {"embeddings": prompts.embeddings}
    manifest = {
        "schema": packs.SCHEMA,
        "kind": KIND,
        "name": weights.name,
        "parameters": weights.parameters(),
        "config": weights.config.to_dict(),
        "form": weights.form,
        "lora_alpha": weights.lora_alpha,
        "region": region,
        "experts": experts,
        "prompts": {"keys": list(prompts.keys), "text_sha256": prompts.text_sha256} if prompts is not None else None,
        "preprocessing": dict(preprocessing or PUBLISHED_PREPROCESSING),
        "about": dict(about or {}),
    }
    return packs.write_pack(path, manifest, tensors)


def _load_pack(path: Path, table: PromptTable | None, encoder: TextEncoder | None, *, verify: bool) -> tuple[SegmenterBundle, str | None]:
    """The bundle, and the hash of the text encoder that its prompts came from."""
    manifest = packs.read_manifest(path, kind=KIND)
    config = _config_of(path, manifest)
    base = _in_32_bits(packs.read_pack_file(path, manifest, BASE_FILE, verify=verify))
    refuse_sizes(config, base, f"{path / packs.MANIFEST}: config")
    faults = [*misfits(base, expected_shapes(config)), *not_finite(base)]
    if faults:
        raise _unfit(path / BASE_FILE, faults, config.name)
    listed: dict[str, dict[str, Any]] = manifest["experts"]
    absent = {name: f"{e['file']} is missing" for name, e in listed.items() if not (path / e["file"]).is_file()}
    there = {name: e for name, e in listed.items() if name not in absent}
    experts = _PackExperts(path, manifest, there, base, verify=verify)
    weights = SegmenterWeights(config, base, experts, form=manifest["form"], lora_alpha=manifest.get("lora_alpha"))
    prompts = manifest.get("prompts")
    if table is None and prompts is not None:
        rows = packs.read_pack_file(path, manifest, PROMPTS_FILE, verify=verify)["embeddings"].float()
        table = PromptTable(tuple(prompts["keys"]), rows, prompts.get("text_sha256"))
    notes = [f"the pack names an expert for {name} that is not there: {reason}" for name, reason in absent.items()]
    bundle = SegmenterBundle(
        weights,
        source=path,
        prompts=table,
        text=encoder,
        preprocessing=manifest["preprocessing"],
        region=manifest.get("region"),
        absent=absent,
        notes=notes,
    )
    return bundle, prompts.get("text_sha256") if prompts else None


def _in_32_bits(state: State) -> State:
    """Weights that a pack holds in 16 bits to save space are used in 32."""
    return {name: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for name, tensor in state.items()}


class _PackExperts(Mapping[str, Expert]):
    """Experts of a pack, read when they are used; one that is damaged spoils only its own region."""

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], base: State, *, verify: bool
    ) -> None:
        self._path, self._manifest, self._entries, self._base, self._verify = path, manifest, entries, base, verify
        self._read: dict[str, Expert] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # without reading the file, as Mapping's own would

    def __getitem__(self, name: str) -> Expert:
        if name not in self._read:
            entry = self._entries[name]
            state = _in_32_bits(packs.read_pack_file(self._path, self._manifest, entry["file"], verify=self._verify))
            targets = dict.fromkeys(key.rsplit(".", 1)[0] for key in state)
            whole = {t for t in targets if f"{t}.lora_A" in state and f"{t}.lora_B" in state}
            expert = Expert({t: (state[f"{t}.lora_A"], state[f"{t}.lora_B"]) for t in whole}, entry["scaling"], entry["layout"])
            strange = [f"unexpected: {key}" for key in state if not key.endswith((".lora_A", ".lora_B"))]
            faults = [*expert_faults(expert.pairs, expert.scaling, expert.layout, self._base), *strange, *not_finite(state)]
            if faults:
                raise _unfit(self._path / entry["file"], faults, f"the base for {name}")
            self._read[name] = expert
        return self._read[name]


def _config_of(path: Path, manifest: Mapping[str, Any]) -> SegmenterConfig:
    try:
        return SegmenterConfig.from_dict(manifest["config"])
    except (TypeError, InputError) as error:  # sizes that are unknown, missing, or do not fit each other
        raise CheckpointError(
            f"{path / packs.MANIFEST}: config", str(error), "the sizes of a segmenter", "copy or export the pack again"
        ) from error


def _unfit(place: Path, faults: list[str], to_what: str) -> CheckpointError:
    counts = {word: sum(fault.startswith(word) for fault in faults) for word in ("missing", "unexpected", "misshapen", "not finite")}
    came = f"does not fit {to_what}: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return CheckpointError(str(place), came, "the weights that the manifest describes", "copy or export the pack again", faults=faults)


def _plain_network(config: SegmenterConfig, state: State) -> Segmenter:
    with torch.device("meta"):
        model = Segmenter(config)
    model.load_state_dict(state, assign=True)  # the tensors themselves, no copies
    return model.eval().requires_grad_(False)


def _keep(bundle: SegmenterBundle, expert: str) -> None:
    if expert not in bundle.regions:
        raise UnknownNameError(f"{bundle.source}: --expert", expert, bundle.regions)
    if bundle.weights.experts:
        kept = {expert: bundle.weights.experts[expert]}
        w = bundle.weights
        bundle.weights = SegmenterWeights(w.config, w.base, kept, w.form, w.lora_alpha)


def _scaling_notes(weights: SegmenterWeights) -> list[str]:
    if weights.form == "balanced":
        return [
            f"equal ranks: scaling is alpha / rank with alpha {weights.lora_alpha:g}; the file does not say it (--lora-alpha changes it)"
        ]
    if weights.form == "imbalanced":
        return ["unequal ranks: LoRKD's imbalanced form, scaling 2 throughout"]
    return []


def _check_width(bundle: SegmenterBundle) -> None:
    for what in (bundle.prompts, bundle.text):
        if what is not None and what.width != bundle.config.query_width:
            raise CheckpointError(
                str(bundle.source),
                f"prompts of width {what.width} for a network of query width {bundle.config.query_width}",
                "prompts of this network",
                "use the text encoder or table that belongs to it",
            )


def _warn_unbound(bundle: SegmenterBundle, given: Sequence[str | None], bound_to: str | None) -> None:
    """A pair is bound when a pack was made of it; prompts given from outside are bound if they came from the same text encoder.

    Args:
        bundle: what was loaded.
        given: hashes of the text encoders behind the table and encoder that were given; None for an unknown one.
        bound_to: hash of the text encoder behind the pack's own prompts.
    """
    if all(sha256 is not None and sha256 == bound_to for sha256 in given):
        return
    note = (
        f"{bundle.source.name} and these prompts were never bound: if they do not belong together, the masks are garbage and nothing "
        "will say so. Export a pack of a pair that you trust"
    )
    bundle.notes = (*bundle.notes, note)
    warnings.warn(note, UnboundPairWarning, stacklevel=3)
