"""Text-prompted 3D segmentation: U-Net, image tokens, query decoder. The architecture of SAT and of LoRKD's students."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.errors import InputError
from medlore.models.segmenter.positional import positional_encoding
from medlore.models.segmenter.unet3d import UNet3d

MASK_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "none": nn.Identity}
PUBLISHED_ACTIVATION = "gelu"


@dataclass(frozen=True)
class SegmenterConfig:
    """Sizes of a segmenter: all that is needed to build one.

    Args:
        features: channels of each U-Net stage, highest resolution first; the first is the width of the pixel embedding.
        convs_per_stage: 3x3x3 convolutions in every encoder and decoder stage.
        strides: stride of each stage; the first is 1.
        query_width: width of a prompt's embedding and of the image tokens.
        projection_width: hidden width between the pooled maps and the image tokens.
        mask_width: hidden width between a decoded query and its mask embedding.
        deep_widths: hidden widths of the mask heads on the decoder maps at 1/2, 1/4, ... (deep supervision); empty for none.
        image_channels: input channels; a grey volume is repeated to 3.
        patch: voxels along an axis of one image token; a window's sides must be multiples of it.
        decoder_layers: cross-attention layers of the query decoder.
        heads: attention heads.
        feedforward: hidden width of a decoder layer's perceptron.
        mask_activation: after the mask embedding: `gelu` as published, or `none`. With GELU no entry of an embedding goes below
            -0.17 and logits of the background become negative slowly; without it a network learns much faster from nothing.

    Raises:
        InputError: sizes that do not fit each other.
    """

    features: tuple[int, ...]
    convs_per_stage: int = 2
    strides: tuple[int, ...] = (1, 2, 2, 2, 2, 2)
    query_width: int = 768
    projection_width: int = 768
    mask_width: int = 256
    deep_widths: tuple[int, ...] = ()
    image_channels: int = 3
    patch: int = 32
    decoder_layers: int = 6
    heads: int = 8
    feedforward: int = 2048
    mask_activation: str = PUBLISHED_ACTIVATION

    def __post_init__(self) -> None:
        faults = list(_config_faults(self))
        if faults:
            fix = "correct what is listed; the published sizes are SAT_NANO, SAT_PRO, LORKD_NANO, LORKD_PRO"
            raise InputError("segmenter sizes", f"{len(faults)} fault(s)", "sizes that fit each other", fix, faults=faults)

    @property
    def pooled_width(self) -> int:
        """Channels of all encoder maps together: the input of the projection."""
        return sum(self.features)

    @property
    def name(self) -> str:
        """`SAT-Nano`, `SAT-Pro`, `LoRKD-Nano`, or `segmenter` for a free size; deep-supervision heads do not count."""
        return next((name for name, config in PUBLISHED.items() if _bare(config) == _bare(self)), "segmenter")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SegmenterConfig:
        """The reverse of `to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


def _config_faults(c: SegmenterConfig) -> list[str]:
    numbers = {f.name: getattr(c, f.name) for f in fields(c) if f.name != "mask_activation"}
    lists = ("features", "strides", "deep_widths")
    faults = [
        f"{name} {value!r} is no {'list of whole numbers' if name in lists else 'whole number'}"
        for name, value in numbers.items()
        if isinstance(value, tuple) != (name in lists) or any(type(v) is not int for v in (value if isinstance(value, tuple) else (value,)))
    ]
    if faults:
        return faults
    if len(c.strides) != len(c.features) or len(c.features) < 2:
        faults.append(f"{len(c.features)} features and {len(c.strides)} strides; as many of both, at least two")
    reaches = list(itertools.accumulate(c.strides, lambda a, b: a * b))
    if not reaches or c.strides[0] != 1 or any(c.patch % reach for reach in reaches):
        faults.append(f"strides {c.strides} must start with 1 and reach divisors of the patch of {c.patch}; they reach {reaches}")
    if c.query_width % c.heads:
        faults.append(f"query_width {c.query_width} is no multiple of {c.heads} heads")
    if len(c.deep_widths) >= max(len(c.features) - 1, 1):
        faults.append(f"{len(c.deep_widths)} deep_widths; the decoder has {len(c.features) - 2} maps below full resolution")
    if not isinstance(c.mask_activation, str) or c.mask_activation not in MASK_ACTIVATIONS:
        faults.append(f"mask_activation {c.mask_activation!r} is none of {', '.join(MASK_ACTIVATIONS)}")
    small = [name for name, value in numbers.items() if min(value if isinstance(value, tuple) else (value,), default=1) < 1]
    if small:
        faults.append(f"{', '.join(small)} must be at least 1")
    return faults


SAT_NANO = SegmenterConfig(features=(64, 64, 128, 256, 512, 768), deep_widths=(256, 384, 512))
SAT_PRO = SegmenterConfig(
    features=(128, 128, 256, 512, 1024, 1536),
    convs_per_stage=3,
    projection_width=1536,
    mask_width=384,
    deep_widths=(384, 512, 512),
)
LORKD_NANO = SegmenterConfig(features=(32, 64, 128, 256, 512), strides=(1, 2, 2, 2, 2))
LORKD_PRO = SegmenterConfig(features=(64, 64, 128, 256, 512, 768))

# LoRKD-Pro without its experts has the sizes of SAT-Nano, which is therefore the name of both.
PUBLISHED = {"SAT-Nano": SAT_NANO, "SAT-Pro": SAT_PRO, "LoRKD-Nano": LORKD_NANO}


def _bare(config: SegmenterConfig) -> dict[str, Any]:
    return {**config.to_dict(), "deep_widths": []}


@dataclass(frozen=True)
class Features:
    """What the network knows of a window before any prompt is asked.

    Attributes:
        pixels: pixel embedding (b, c0, h, w, d).
        tokens: image embedding (b, t, query_width), t = h w d / patch^3, d fastest.
        grid: number of tokens along h, w, d.
        lower: decoder maps at 1/2, 1/4, ... for deep supervision; empty when not asked for.
    """

    pixels: Tensor
    tokens: Tensor
    grid: tuple[int, int, int]
    lower: tuple[Tensor, ...] = ()


class QueryLayer(nn.Module):
    """Pre-norm cross-attention from queries to image tokens, then a perceptron; queries do not see each other.

    `norm1` takes no part: it belongs to the published names, and a file that holds it must load completely.
    """

    def __init__(self, width: int, *, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm1 = nn.LayerNorm(width).requires_grad_(False)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries (b, n, width), keys and values (b, t, width) -> (b, n, width)."""
        seen, _ = self.multihead_attn(self.norm2(queries), keys, values, need_weights=False)
        queries = queries + self._drop(seen)
        hidden = self._drop(F.relu(self.linear1(self.norm3(queries))))
        return queries + self._drop(self.linear2(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, training=self.training)


class QueryDecoder(nn.Module):
    """Layers of `QueryLayer` and a last LayerNorm."""

    def __init__(self, width: int, *, layers: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QueryLayer(width, heads=heads, feedforward=feedforward, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for weight in (p for p in self.parameters() if p.dim() > 1):
            nn.init.xavier_uniform_(weight)

    def forward(self, queries: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Queries (b, n, width), tokens (b, t, width), positions (t, width) -> (b, n, width)."""
        keys = tokens + positions.to(tokens.dtype)
        for layer in self.layers:
            queries = layer(queries, keys, tokens)
        return cast("Tensor", self.norm(queries))


class Segmenter(nn.Module):
    """A U-Net whose pixels are compared with the decoded embedding of each prompt.

    The U-Net runs once a window (`encode`); prompts are asked of its result (`decode`) in groups of any size, since the
    answer to one prompt never depends on the others. Names in the state dict are SAT's, without `module.`.

    Args:
        config: the sizes; only they are built.
        dropout: in the query decoder, in train mode.

    Example:
        >>> tiny = SegmenterConfig((4, 8), strides=(1, 2), patch=2, query_width=12, heads=2, projection_width=8,
        ...                        mask_width=8, feedforward=16, decoder_layers=1)
        >>> Segmenter(tiny)(torch.zeros(1, 3, 4, 4, 2), torch.zeros(5, 12)).shape
        torch.Size([1, 5, 4, 4, 2])
    """

    def __init__(self, config: SegmenterConfig, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.config = config
        width = config.query_width
        self.backbone = UNet3d(config.image_channels, config.features, blocks=config.convs_per_stage, strides=config.strides)
        self.projection_layer = _perceptron(config.pooled_width, config.projection_width, width, last=nn.GELU())
        self.transformer_decoder = QueryDecoder(
            width, layers=config.decoder_layers, heads=config.heads, feedforward=config.feedforward, dropout=dropout
        )
        activation = MASK_ACTIVATIONS[config.mask_activation]
        if config.deep_widths:
            lower = zip(config.deep_widths, config.features[1:], strict=False)
            self.mid_mask_embed_proj = nn.ModuleList(_perceptron(width, hidden, out, last=activation()) for hidden, out in lower)
        self.mask_embed_proj = _perceptron(width, config.mask_width, config.features[0], last=activation())

    def encode(self, x: Tensor, *, deep: bool = False) -> Features:
        """The window's pixel and image embeddings.

        Args:
            x: normalised window (b, 3, h, w, d); h, w, d multiples of `config.patch`.
            deep: keep the lower decoder maps too, for deep supervision.

        Raises:
            InputError: a window of the wrong channels or sides.
        """
        grid = self._token_grid(x)
        encoded = self.backbone.encoder(x)
        pooled = torch.cat([_pooled(stage, grid) for stage in encoded], dim=1)  # b c gh gw gd
        decoded = self.backbone.decoder(encoded)  # frees each map of the encoder once it was used
        tokens = self.projection_layer(pooled.flatten(2).transpose(1, 2))  # b t width
        lower = tuple(decoded[1 : 1 + len(self.config.deep_widths)]) if deep else ()
        return Features(decoded[0], tokens, grid, lower)

    def decoded_queries(self, features: Features, queries: Tensor) -> Tensor:
        """Prompts (n, width) or (b, n, width), after they have looked at the window's tokens: (b, n, width)."""
        batch = features.tokens.shape[0]
        queries = queries.expand(batch, -1, -1) if queries.dim() == 2 else queries
        positions = positional_encoding(features.grid, self.config.query_width, device=features.tokens.device).flatten(0, 2)
        return cast("Tensor", self.transformer_decoder(queries, features.tokens, positions))

    def mask_embeddings(self, features: Features, queries: Tensor) -> Tensor:
        """One vector a prompt, to be compared with every pixel: (b, n, c0)."""
        return cast("Tensor", self.mask_embed_proj(self.decoded_queries(features, queries)))

    def decode(self, features: Features, queries: Tensor) -> Tensor:
        """Logits (b, n, h, w, d) of prompts (n, width) or (b, n, width)."""
        return compare(self.mask_embeddings(features, queries), features.pixels)

    def deep_logits(self, features: Features, queries: Tensor) -> list[Tensor]:
        """Logits at full, 1/2, 1/4, ... resolution, for deep supervision; `features` from `encode(x, deep=True)`.

        Raises:
            InputError: the model has no such heads, or the features were encoded without the lower maps.
        """
        if not features.lower or not self.config.deep_widths:
            raise InputError(
                "deep_logits", "no heads or no lower maps", "a config with deep_widths and encode(x, deep=True)", "set both, or use decode"
            )
        decoded = self.decoded_queries(features, queries)
        heads = [self.mask_embed_proj, *self.mid_mask_embed_proj]
        return [compare(head(decoded), pixels) for head, pixels in zip(heads, (features.pixels, *features.lower), strict=True)]

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        """Window (b, 3, h, w, d) and prompts (n, width) or (b, n, width) -> logits (b, n, h, w, d)."""
        return self.decode(self.encode(x), queries)

    def _token_grid(self, x: Tensor) -> tuple[int, int, int]:
        patch, channels, reach = self.config.patch, self.config.image_channels, math.prod(self.config.strides)
        fits = x.dim() == 5 and x.shape[1] == channels and all(side and side % patch == 0 for side in x.shape[2:])
        # Instance normalisation of a single voxel has no spread to divide by.
        if not fits or math.prod(x.shape[2:]) <= reach**3:
            accepted = f"(b, {channels}, h, w, d) with h, w, d multiples of {patch} and more than {reach}^3 voxels"
            raise InputError("window", f"shape {tuple(x.shape)}", accepted, "pad the window at its ends")
        h, w, d = (side // patch for side in x.shape[2:])
        return h, w, d


def _pooled(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Means over the blocks of a grid: (b c h w d) -> (b c gh gw gd)."""
    b, c, h, w, d = x.shape
    if c == 1 or x.stride(1) != 1:
        return F.adaptive_avg_pool3d(x, grid)
    # Channels last: PyTorch's pooling is many times slower there, so each plane is multiplied by the matrix of its means.
    gh, gw, gd = grid
    share = gw * gd / (w * d)
    of_w = torch.eye(gw, dtype=x.dtype, device=x.device).repeat_interleave(w // gw, dim=1)
    of_d = torch.eye(gd, dtype=x.dtype, device=x.device).repeat_interleave(d // gd, dim=1)
    means = torch.kron(of_w, of_d) * share @ x.permute(0, 2, 3, 4, 1).reshape(b * h, w * d, c)  # b*h gw*gd c
    return means.view(b, gh, h // gh, gw, gd, c).mean(2).permute(0, 4, 1, 2, 3)


def compare(embeddings: Tensor, pixels: Tensor) -> Tensor:
    """Scalar products of mask embeddings (b, n, c) with pixels (b, c, h, w, d): logits (b, n, h, w, d), in 32 bits under autocast."""
    device = pixels.device.type
    kind = torch.float32 if torch.is_autocast_enabled(device) else pixels.dtype
    # Under autocast too: logits deserve the bits, and oneDNN's bf16 product of so few rows with so many columns divides by zero
    # in the backward pass on processors with AMX (6 x 16 by 16 x 64^3, oneDNN of torch 2.13).
    with torch.autocast(device, enabled=False):
        # One matrix product; einsum would do the same after moving axes about.
        logits: Tensor = embeddings.to(kind) @ pixels.flatten(2).to(kind)  # b n voxels
    return logits.view(*logits.shape[:2], *pixels.shape[2:])


def count_parameters(config: SegmenterConfig) -> int:
    """Number of weights of a segmenter of these sizes, without allocating any.

    Example:
        >>> count_parameters(LORKD_NANO)
        57235872
    """
    with torch.device("meta"):
        return sum(p.numel() for p in Segmenter(config).parameters())


def expert_targets(config: SegmenterConfig) -> dict[str, int]:
    """Module names that LoRKD adapts (every 3x3x3 convolution), each with its rank in units of the expert's rank.

    The encoder has one unit, the decoder two.

    Example:
        >>> targets = expert_targets(LORKD_NANO)
        >>> len(targets), targets["backbone.decoder.stages.0.convs.0.conv"]
        (18, 2)
    """
    stages, blocks = len(config.features), range(config.convs_per_stage)
    encoder = {f"backbone.encoder.stages.{s}.0.convs.{i}.conv": 1 for s in range(stages) for i in blocks}
    decoder = {f"backbone.decoder.stages.{s}.convs.{i}.conv": 2 for s in range(stages - 1) for i in blocks}
    return {**encoder, **decoder}


def _perceptron(inputs: int, hidden: int, outputs: int, *, last: nn.Module) -> nn.Sequential:
    """Two linear layers, GELU between; indices 0 and 2 hold the weights, as published."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs), last)
