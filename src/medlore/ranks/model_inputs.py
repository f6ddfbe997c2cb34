"""Arguments with which an attention module can be called: tokens made up for it alone, or what its network hands to it.

The values do not matter, their shapes do. A network is run once, on the smallest input that it says it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError, AssertionError, ImportError)
_TOKENS = 6
_CACHES = ("past_key_value", "past_key_values", "layer_past", "cache_params", "cache")
_PICTURE_SIDES = (224, 256, 64, 32)


@dataclass(frozen=True)
class ArgumentsFound:
    """How to call a module."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def as_float(self) -> ArgumentsFound:
        """The same on the CPU in float32, without caches."""
        named = {k: _plain(v) for k, v in self.named.items() if k not in _CACHES}
        return ArgumentsFound(tuple(_plain(a) for a in self.positional), named)


class _Reached(Exception):  # noqa: N818 - a way out, not an error
    """The module that was waited for has been called."""


def module_arguments(model: nn.Module, owner: nn.Module, path: str, *, width: int) -> Iterator[ArgumentsFound]:
    """Arguments that `owner` may take, the cheap ones first.

    Args:
        model: the network that holds it.
        owner: an attention module.
        path: of it in the network.
        width: of its tokens.
    """
    for count in _token_counts(owner):
        yield ArgumentsFound((torch.randn(1, count, width),), {})
    if path:
        for arguments in _network_inputs(model):
            if (found := _handed_over(model, owner, arguments)) is not None:
                yield found
                return


def _token_counts(owner: nn.Module) -> list[int]:
    """Numbers of tokens that an attention may be bound to: those of its window, of its table of positions, or a few."""
    counts = []
    window = getattr(owner, "window_size", None)
    if isinstance(window, int | tuple | list):
        counts.append(window**2 if isinstance(window, int) else math.prod(window))
    for name, buffer in owner.named_buffers():
        if "index" in name or "idxs" in name:
            counts.append(buffer.shape[-1])
    return [*(c for c in dict.fromkeys(counts) if 1 < c < 4096), _TOKENS]


def _handed_over(model: nn.Module, owner: nn.Module, arguments: Mapping[str, Any]) -> ArgumentsFound | None:
    """What `owner` is called with when the network runs; the run ends there."""
    caught: list[ArgumentsFound] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(ArgumentsFound(args, kwargs))
        raise _Reached

    modes = [module for module in model.modules() if module.training]
    hook = owner.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.eval()
        with torch.no_grad():
            model(**arguments) if "" not in arguments else model(arguments[""])
    except (_Reached, *_FAILURES):
        pass
    finally:
        hook.remove()
        for module in modes:
            module.training = True
    return caught[0] if caught else None


def _network_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs that a network may take: what transformers' networks name, else pictures."""
    parameter = next(model.parameters(), torch.empty(0))
    place: dict[str, Any] = {"device": parameter.device}
    kind: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    config = getattr(model, "config", None)
    name = str(getattr(model, "main_input_name", ""))
    if name and config is not None:
        yield from _by_configuration(name, config, place, kind)
        return
    for side in _PICTURE_SIDES:
        yield {"": torch.randn(1, 3, side, side, **kind)}


def _by_configuration(name: str, config: Any, place: dict[str, Any], kind: dict[str, Any]) -> Iterator[dict[str, Any]]:
    words = int(getattr(_text(config), "vocab_size", 0) or 100)
    ids = torch.arange(1, 1 + _TOKENS, **place) % words
    tokens = {"input_ids": ids[None]}
    picture = _picture(config, kind)
    makers: dict[str, list[dict[str, Any]]] = {
        "input_ids": [tokens, tokens | {"decoder_input_ids": ids[None]}, tokens | picture],
        "pixel_values": [picture, picture | tokens],
        "hidden_states": [_patches(config, kind, place)],
        "input_values": [{"input_values": torch.randn(1, 16000, **kind)}],
    }
    yield from makers.get(name, [])
    if name not in makers:
        bins = int(getattr(config, "num_mel_bins", 80) or 80)
        length = 2 * int(getattr(config, "max_source_positions", 1500) or 1500)
        yield {name: torch.randn(1, bins, length, **kind), "decoder_input_ids": ids[None]}
        yield {name: torch.randn(1, length, bins, **kind)}


def _text(config: Any) -> Any:
    return getattr(config, "text_config", None) or config


def _picture(config: Any, kind: dict[str, Any]) -> dict[str, Any]:
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", None) or 224
    height, wide = (side, side) if isinstance(side, int) else (side[0], side[-1])
    channels = int(getattr(vision, "num_channels", 3) or 3)
    frames = getattr(vision, "num_frames", None)
    shape = (1, int(frames), channels, height, wide) if frames else (1, channels, height, wide)
    return {"pixel_values": torch.randn(*shape, **kind)}


def _patches(config: Any, kind: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    """The patches of one small picture, as the image halves of Qwen-VL and its kin take them."""
    side = 2 * int(getattr(config, "spatial_merge_size", 2) or 2)
    patch = int(getattr(config, "patch_size", 14) or 14)
    columns = int(getattr(config, "in_channels", None) or 3) * int(getattr(config, "temporal_patch_size", 1) or 1) * patch**2
    return {"hidden_states": torch.randn(side * side, columns, **kind), "grid_thw": torch.tensor([[1, side, side]], **place)}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
    if isinstance(value, tuple | list):
        return type(value)(_plain(v) for v in value)
    return value
