"""Published SAT and LoRKD files: recognised by their keys, renamed, checked whole, ranks read from the shapes.

Canonical names are SAT's without `module.`; a file may hold several copies of a weight (`all_modules.*`, `unet.*`), which are
compared and dropped. A file that fits only in part is refused with one report of everything that is missing, unexpected or of
the wrong shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from medlore.errors import CheckpointError, InputError
from medlore.linalg.factors import delta_weight
from medlore.linalg.matricize import Layout
from medlore.models import packs
from medlore.models.segmenter.fit import FACTOR, factor_faults, misfits, not_finite
from medlore.models.segmenter.network import PUBLISHED, Segmenter, SegmenterConfig
from medlore.models.segmenter.vocabulary import REGIONS
from medlore.models.statefile import State, read_state

IMBALANCED_SCALING = 2.0
DEFAULT_ALPHA = 16.0

Form = Literal["plain", "balanced", "imbalanced"]
Kind = Literal["segmenter", "text encoder"]

_PREFIXES = ("model.", "module.")
_COPIES = (
    (re.compile(r"^unet\."), "backbone."),
    (re.compile(r"\.all_modules\.0\."), ".conv."),
    (re.compile(r"\.all_modules\.1\."), ".norm."),
)
_LORKD = re.compile(
    r"^(backbone\.(?:encoder\.stages\.\d+\.0|decoder\.stages\.\d+))\.stages\.(\d+)\.(conv|norm)\.(?:conv\.(?=weight|bias))?"
)
_FOREIGN = {"swinvit": "SwinUNETR", "mamba": "UMamba", ".a_log": "UMamba"}


@dataclass(frozen=True)
class Expert:
    """One region's low-rank change of the shared base.

    Attributes:
        pairs: module name of a convolution -> (lora_A, lora_B).
        scaling: module name -> factor before the product.
        layout: how a pair is read; `interleaved` in published files.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scaling: Mapping[str, float]
    layout: Layout = "interleaved"

    def ranks(self, base: Mapping[str, Tensor]) -> dict[str, int]:
        """Module name -> rank."""
        sides = {
            t: base[f"{t}.weight"].shape[2] if self.layout == "interleaved" and base[f"{t}.weight"].dim() > 2 else 1 for t in self.pairs
        }
        return {target: lora_A.shape[0] // sides[target] for target, (lora_A, _) in self.pairs.items()}

    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(a.numel() + b.numel() for a, b in self.pairs.values())


@dataclass(frozen=True)
class SegmenterWeights:
    """Shared base and experts of one file or pack, under canonical names; tensors may be mapped from disk and are never changed.

    Attributes:
        config: the sizes.
        base: state dict of `Segmenter(config)`.
        experts: region -> its change; empty for SAT and for a merged expert.
        form: `plain`, or how LoRKD shared the ranks out.
        lora_alpha: the alpha that made the scalings of a balanced file; None otherwise.
    """

    config: SegmenterConfig
    base: State
    experts: Mapping[str, Expert]
    form: Form = "plain"
    lora_alpha: float | None = None

    @property
    def name(self) -> str:
        """`SAT-Nano`, `SAT-Pro`, `LoRKD-Nano`, `LoRKD-Pro` or `segmenter`."""
        if self.experts:
            return {"SAT-Nano": "LoRKD-Pro", "LoRKD-Nano": "LoRKD-Nano"}.get(self.config.name, "segmenter with experts")
        return self.config.name

    def parameters(self) -> int:
        """Numbers in the base and in all experts."""
        return sum(w.numel() for w in self.base.values()) + sum(e.parameters() for e in self.experts.values())

    def rank_of(self, region: str) -> int:
        """Smallest rank of a region's expert: the encoder's in published files, whose decoder has twice as much."""
        return min(self.experts[region].ranks(self.base).values(), default=0)

    def merged(self, region: str | None) -> State:
        """State dict with the weights of one expert, `W0 + s B A`; tensors that an expert leaves alone are shared, not copied."""
        state = dict(self.base)
        for target, (lora_A, lora_B) in (self.experts[region].pairs if region is not None else {}).items():
            expert, name = self.experts[str(region)], f"{target}.weight"
            base = state[name].float()
            state[name] = base + delta_weight(
                lora_A.float(), lora_B.float(), weight_shape=base.shape, layout=expert.layout, scaling=expert.scaling[target]
            )
        return state

    def only(self, region: str) -> SegmenterWeights:
        """The merged expert as a plain model."""
        return SegmenterWeights(self.config, self.merged(region), {})


def recognise(names: Iterable[str]) -> Kind | None:
    """What a file is, from its keys alone; None for a file of another family.

    Raises:
        CheckpointError: a backbone of SAT's that is not supported; it is named.

    Examples:
        >>> recognise(["module.backbone.encoder.stages.0.0.convs.0.conv.weight"])
        'segmenter'
    """
    bare = [bare_name(name) for name in names]
    if any(name.startswith("text_tower.") for name in bare):
        return "text encoder"
    for sign, backbone in _FOREIGN.items():
        if any(sign in name.lower() for name in bare) and any(name.startswith("backbone.") for name in bare):
            raise CheckpointError(
                "backbone",
                f"{backbone} (keys with {sign!r})",
                f"the plain U-Net of {', '.join(PUBLISHED)} and LoRKD-Pro",
                "use SAT's U-Net weights (Nano or Pro)",
            )
    return "segmenter" if any(name.startswith(("backbone.encoder.stages.", "unet.encoder.stages.")) for name in bare) else None


def read_segmenter(path: str | Path, *, lora_alpha: float | None = None) -> SegmenterWeights:
    """A published SAT or LoRKD file, or one of our own in the same names.

    Args:
        path: .pth or .safetensors.
        lora_alpha: alpha of a file with equal ranks (scaling alpha / rank; the file does not say); 16 by default.

    Raises:
        InputError: no such file, or an alpha for a file whose scaling is constant.
        CheckpointError: not a segmenter, an unsupported backbone, or a file that fits only in part.
    """
    path = Path(path)
    _refuse_part_of_pack(path)
    try:
        state = read_state(path)
        if recognise(state) != "segmenter":
            raise CheckpointError(
                "keys",
                f"{len(state)} weights such as {next(iter(state))!r}, none of a SAT U-Net",
                "a vision file of SAT or LoRKD",
                "name the vision file; a text encoder goes to --text",
            )
        return segmenter_weights(state, lora_alpha=lora_alpha)
    except (CheckpointError, InputError) as error:
        raise (error if str(path) in error.where else error.at(str(path))) from error


def _refuse_part_of_pack(path: Path) -> None:
    """The base of a pack looks like a published file, but heads, patch and activation stand in its manifest alone."""
    if packs.is_pack(path.parent) and path.name == packs.BASE and path.is_file():
        fix = f"name the folder {path.parent}"
        raise CheckpointError(
            str(path), "the base of a pack, whose sizes and experts stand in the manifest beside it", "the whole pack", fix
        )


def segmenter_weights(state: State, *, lora_alpha: float | None = None) -> SegmenterWeights:
    """Canonical weights of a state dict with published names.

    Raises:
        InputError: an alpha for a file whose scaling is constant.
        CheckpointError: copies that differ, or a file that fits only in part.
    """
    weights = _canonical(state)
    factors = {name: weights.pop(name) for name in list(weights) if FACTOR.match(name)}
    config = _best_config(weights)
    faults = [*misfits(weights, expected_shapes(config)), *factor_faults(factors, weights), *not_finite(weights), *not_finite(factors)]
    if faults:
        raise _partial(config.name, faults)
    base = {name: tensor.float() for name, tensor in weights.items()}
    if not factors:
        return SegmenterWeights(config, base, {})
    pairs = _pairs(factors)
    regions = REGIONS if len(pairs) == len(REGIONS) else tuple(f"expert {t}" for t in range(len(pairs)))
    experts = {region: Expert(pairs[t], {}) for t, region in enumerate(regions)}
    return _scaled(SegmenterWeights(config, base, experts), lora_alpha)


def expected_shapes(config: SegmenterConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of a segmenter, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in Segmenter(config).state_dict().items()}


def _scaled(weights: SegmenterWeights, lora_alpha: float | None) -> SegmenterWeights:
    """Equal ranks: alpha / rank of each layer. Unequal ones: the constant 2 of the imbalanced form."""
    ranks = {region: expert.ranks(weights.base) for region, expert in weights.experts.items()}
    balanced = len({tuple(r.items()) for r in ranks.values()}) == 1
    if not balanced and lora_alpha is not None:
        raise InputError(
            "--lora-alpha",
            f"{lora_alpha:g} for a file with unequal ranks",
            f"no alpha: the imbalanced form has the constant scaling {IMBALANCED_SCALING:g}",
            "leave it out",
        )
    alpha = (DEFAULT_ALPHA if lora_alpha is None else lora_alpha) if balanced else None
    experts = {
        region: replace(expert, scaling={t: IMBALANCED_SCALING if alpha is None else alpha / rank for t, rank in ranks[region].items()})
        for region, expert in weights.experts.items()
    }
    return replace(weights, experts=experts, form="balanced" if balanced else "imbalanced", lora_alpha=alpha)


def bare_name(name: str) -> str:
    """A weight's name without `model.` and `module.` in front.

    Examples:
        >>> bare_name("module.text_tower.biolord.pooler.dense.bias")
        'text_tower.biolord.pooler.dense.bias'
    """
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def canonical_name(name: str) -> str:
    """SAT's name of a weight, without prefixes, for any of its published names.

    Examples:
        >>> canonical_name("model.module.backbone.encoder.stages.0.0.stages.1.conv.conv.weight")
        'backbone.encoder.stages.0.0.convs.1.conv.weight'
        >>> canonical_name("unet.decoder.stages.2.stages.0.conv.lora_A_list.7")
        'backbone.decoder.stages.2.convs.0.conv.lora_A_list.7'
    """
    name = bare_name(name)
    for pattern, canonical in _COPIES:
        name = pattern.sub(canonical, name)
    return _LORKD.sub(r"\1.convs.\2.\3.", name)


def _canonical(state: State) -> State:
    weights: State = {}
    origin: dict[str, str] = {}
    faults = []
    for name, tensor in state.items():
        canonical = canonical_name(name)
        first = weights.setdefault(canonical, tensor)
        if first is not tensor and not _same(first, tensor):
            faults.append(f"{name} differs from its copy {origin[canonical]}")
        origin.setdefault(canonical, name)
    if faults:
        fix = "fetch the file again; if it was made by hand, keep one copy of each weight"
        raise CheckpointError("copies", f"{len(faults)} weight(s) stored twice with different values", "equal copies", fix, faults=faults)
    return weights


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included, so that a broken file is reported as broken and not as two copies."""
    return a.shape == b.shape and (torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _best_config(weights: State) -> SegmenterConfig:
    """The sizes that the shapes imply, or the published sizes that most of the weights fit."""
    read = _config_from_shapes(weights)
    if read is not None:
        return read
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}

    def hits(config: SegmenterConfig) -> int:
        expected = expected_shapes(config)
        return sum(shapes.get(name) == shape for name, shape in expected.items())

    return max(PUBLISHED.values(), key=hits)


def _config_from_shapes(weights: State) -> SegmenterConfig | None:
    """Sizes of a free or published segmenter; None when a weight that determines one of them is missing.

    Strides are the kernels of the transposed convolutions. The patch (32) and the heads (8) leave no trace in a file.
    """
    stages = 1 + _highest(weights, r"backbone\.encoder\.stages\.(\d+)\.0\.convs\.0\.conv\.weight")
    blocks = 1 + _highest(weights, r"backbone\.encoder\.stages\.\d+\.0\.convs\.(\d+)\.conv\.weight")
    layers = 1 + _highest(weights, r"transformer_decoder\.layers\.(\d+)\.linear1\.weight")
    deep = 1 + _highest(weights, r"mid_mask_embed_proj\.(\d+)\.0\.weight")
    if max(stages, blocks, layers, deep) > len(weights):  # numbers in names that no whole file can have
        return None
    try:
        convs = [weights[f"backbone.encoder.stages.{s}.0.convs.0.conv.weight"] for s in range(stages)]
        ups = [weights[f"backbone.decoder.transpconvs.{s}.weight"] for s in range(stages - 1)]
        return SegmenterConfig(
            features=tuple(w.shape[0] for w in convs),
            convs_per_stage=blocks,
            strides=(1, *(w.shape[2] for w in reversed(ups))),
            query_width=weights["projection_layer.2.weight"].shape[0],
            projection_width=weights["projection_layer.0.weight"].shape[0],
            mask_width=weights["mask_embed_proj.0.weight"].shape[0],
            deep_widths=tuple(weights[f"mid_mask_embed_proj.{i}.0.weight"].shape[0] for i in range(deep)),
            image_channels=convs[0].shape[1],
            decoder_layers=layers,
            feedforward=weights["transformer_decoder.layers.0.linear1.weight"].shape[0],
        )
    except (KeyError, IndexError, InputError):
        return None


def _highest(weights: State, pattern: str) -> int:
    return max((int(found[1]) for name in weights if (found := re.fullmatch(pattern, name))), default=-1)


def _pairs(factors: State) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Expert number -> target -> (A, B)."""
    pairs: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, lora_A in factors.items():
        part = FACTOR.fullmatch(name)
        if part is not None and part["side"] == "A":
            lora_B = factors[f"{part['target']}.lora_B_list.{part['expert']}"]
            pairs.setdefault(int(part["expert"]), {})[part["target"]] = (lora_A.float(), lora_B.float())
    return [pairs[t] for t in sorted(pairs)]


def _partial(name: str, faults: list[str]) -> CheckpointError:
    counts = {word: sum(fault.startswith(word) for fault in faults) for word in ("missing", "unexpected", "misshapen", "not finite")}
    came = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return CheckpointError(
        "weights",
        f"fits {name} only in part: {came}",
        "a whole file of SAT-Nano, SAT-Pro, LoRKD-Nano, LoRKD-Pro, or of a free size of the same architecture",
        "fetch the file again, or name the file that the list belongs to",
        faults=faults,
    )
