"""One expert as a LoRA file that other tools read: PEFT folders, and single files with kohya's keys (LyCORIS reads them).

Both formats hold one pair a layer in the channel layout, for the shared base as the network to be adapted (``merge(model, None)``).
The conversion is exact to rounding: an interleaved pair of rank r becomes a channel pair of rank at most ``r * k**2``.
What a format, or its reader, gets wrong is refused with the reason, never written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medlore.errors import CheckpointError, InputError, TargetError, UnknownNameError, nearest_names
from medlore.files import atomic_folder, atomic_path, existing_file, read_json
from medlore.layers.experts.layer import ExpertLayer
from medlore.layers.experts.routing import roster_of
from medlore.layers.experts.surgery import expert_layers
from medlore.linalg.factors import converted

PEFT_PREFIX = "base_model.model."
PlainPair = tuple[Tensor, Tensor, float]  # lora_A, lora_B, alpha


def channel_pairs(model: nn.Module, expert: str, *, rank: int | None = None) -> tuple[dict[str, PlainPair], float]:
    """An expert's pairs in the channel layout: layer -> (lora_A, lora_B, alpha), and the largest Frobenius error.

    Args:
        model: a network with experts.
        expert: its name.
        rank: an upper bound for the ranks; without one the conversion is exact to rounding.

    Returns:
        The pairs of every layer in which the expert has a rank; alpha = scaling * rank. And the largest error of a weight change
        (0 for the channel layout without a bound), scaling included.

    Raises:
        UnknownNameError: no such expert.

    Source: ours.
    """
    roster = roster_of(model)
    if expert not in roster:
        raise UnknownNameError("expert", expert, roster)
    pairs: dict[str, PlainPair] = {}
    largest = 0.0
    for name, layer in expert_layers(model):
        pair = layer.pair(expert)
        if pair is None:
            continue
        shape = layer.base_layer.weight.shape
        lora_A, lora_B, error = converted(pair.lora_A, pair.lora_B, weight_shape=shape, layout=pair.layout, rank=rank)
        pairs[name] = (lora_A, lora_B, pair.scaling * lora_A.shape[0])
        largest = max(largest, abs(pair.scaling) * error)
    return pairs, largest


def peft_faults(model: nn.Module, expert: str) -> list[str]:
    """Why PEFT could not run or merge an expert: one line per layer. Found by running PEFT 0.21."""
    return [f"{name}: {why}" for name, layer in expert_layers(model) if layer.ranks[expert] for why in _peft_refusals(layer)]


def _peft_refusals(layer: ExpertLayer) -> Iterator[str]:
    base = layer.base_layer
    if isinstance(base, nn.Linear):
        return
    if base.groups > 1:
        yield f"groups={base.groups}; PEFT cannot merge a grouped convolution"
    if any(d != 1 for d in base.dilation):
        yield f"dilation={tuple(base.dilation)}; PEFT does not hand it to lora_A and fails in forward"
    if base.padding_mode != "zeros":
        yield f"padding_mode={base.padding_mode!r}; PEFT pads lora_A with zeros, its merge is silently wrong"
    if isinstance(base, nn.Conv3d) and tuple(base.kernel_size[:2]) == (1, 1):
        yield f"kernel {tuple(base.kernel_size)}; PEFT takes it for a 2D one when it merges and fails"


def save_peft(model: nn.Module, expert: str, folder: str | Path, *, rank: int | None = None) -> float:
    """Write an expert as a PEFT adapter folder for the shared base network.

    Args:
        model: a network with experts.
        expert: its name.
        folder: to be made; `adapter_config.json` and `adapter_model.safetensors`.
        rank: an upper bound for the ranks, with a known error.

    Returns:
        The largest Frobenius error of a weight change.

    Raises:
        UnknownNameError: no such expert.
        TargetError: layers that PEFT cannot run or merge, each with the reason; nothing is written.

    Source: the adapter format of PEFT 0.21.
    """
    pairs, error = channel_pairs(model, expert, rank=rank)
    faults = peft_faults(model, expert)
    if faults:
        raise TargetError(
            f"expert {expert!r} as a PEFT adapter",
            f"{len(faults)} layers do not fit",
            "layers that PEFT runs and merges rightly",
            "export it merged, or as a kohya file",
            faults=faults,
        )
    state = {}
    for name, (lora_A, lora_B, _) in pairs.items():
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"] = lora_A.contiguous()
        state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = lora_B.contiguous()
    with atomic_folder(Path(folder)) as made:
        _peft_config(pairs).save_pretrained(str(made))
        save_file(state, made / "adapter_model.safetensors", metadata={"format": "pt"})
    return error


def _peft_config(pairs: Mapping[str, PlainPair]) -> Any:
    """Names are anchored: PEFT would take the pattern `conv` for `block.conv` too."""
    from peft import LoraConfig

    return LoraConfig(
        r=max(lora_A.shape[0] for lora_A, _, _ in pairs.values()),
        target_modules="|".join(re.escape(name) for name in pairs),
        rank_pattern={"^" + re.escape(name): lora_A.shape[0] for name, (lora_A, _, _) in pairs.items()},
        alpha_pattern={"^" + re.escape(name): alpha for name, (_, _, alpha) in pairs.items()},
        inference_mode=True,
    )


def load_peft(model: nn.Module, expert: str, folder: str | Path) -> None:
    """Put a PEFT adapter into an expert of a network with channel layout; ranks and scalings become the adapter's.

    Raises:
        InputError: a file of the adapter is missing.
        DataError: its configuration is not JSON.
        CheckpointError: damaged tensors, a variant that is more than a plain pair, or layers and shapes that do not fit; nothing is
            changed then.

    Source: the adapter format of PEFT 0.21.
    """
    folder = Path(folder)
    content = read_json(folder / "adapter_config.json")
    config = content if isinstance(content, dict) else {}
    variants = [name for name in ("use_dora", "lora_bias", "modules_to_save", "layer_replication") if config.get(name)]
    if variants or config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise CheckpointError(
            str(folder),
            f"peft_type {config.get('peft_type')} with {variants or 'bias'}",
            "a plain LoRA adapter",
            "convert it with PEFT first",
        )
    state = _read_tensors(folder / "adapter_model.safetensors")
    pairs: dict[str, PlainPair] = {}
    for key in state:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
            lora_A, lora_B = state[key], state.get(key.replace(".lora_A.", ".lora_B."), torch.empty(0))
            alpha = float(_by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 1)))
            root = lora_A.shape[0] ** 0.5 if config.get("use_rslora") else 1.0  # alpha / sqrt(r) = (alpha * sqrt(r)) / r
            pairs[name] = (lora_A, lora_B, alpha * root)
    put_pairs(model, expert, pairs, where=str(folder))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(existing_file(path))
        return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", "a whole .safetensors file", "fetch the file again") from error


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the name, or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def to_kohya(model: nn.Module, expert: str, *, prefix: str = "lycoris", rank: int | None = None) -> tuple[dict[str, Tensor], float]:
    """An expert under kohya's keys: `<prefix>_<layer_with_underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    Returns:
        The tensors, and the largest Frobenius error of a weight change.

    Raises:
        UnknownNameError: no such expert.
        TargetError: two layers whose names become one.

    Source: the key convention of kohya's scripts, as LyCORIS 4 reads it.
    """
    pairs, error = channel_pairs(model, expert, rank=rank)
    state: dict[str, Tensor] = {}
    for name, (lora_A, lora_B, alpha) in pairs.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        if f"{key}.alpha" in state:
            raise TargetError(name, f"the key {key!r} is taken by another layer", "names that differ without their dots", "rename a layer")
        state[f"{key}.lora_down.weight"] = lora_A.contiguous()
        state[f"{key}.lora_up.weight"] = lora_B.contiguous()
        state[f"{key}.alpha"] = torch.tensor(alpha)
    return state, error


def save_kohya(model: nn.Module, expert: str, path: str | Path, *, prefix: str = "lycoris", rank: int | None = None) -> float:
    """Write :func:`to_kohya` as one safetensors file; returns the largest Frobenius error."""
    state, error = to_kohya(model, expert, prefix=prefix, rank=rank)
    with atomic_path(Path(path)) as made:
        save_file(state, made, metadata={"ss_network_module": "lycoris.kohya"})
    return error


def load_kohya(model: nn.Module, expert: str, path: str | Path, *, prefix: str = "lycoris") -> None:
    """Put a file with kohya's keys into an expert of a network with channel layout.

    Raises:
        CheckpointError: a damaged file, Tucker, DoRA or other forms, or layers and shapes that do not fit; nothing is changed then.

    Source: the key convention of kohya's scripts.
    """
    state = _read_tensors(Path(path))
    foreign = [key for key in state if not key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha"))]
    if foreign:
        raise CheckpointError(str(path), f"{len(foreign)} other keys", "lora_down, lora_up, alpha", "convert it first", faults=foreign)
    names = {f"{prefix}_{name.replace('.', '_')}": name for name, _ in expert_layers(model)}
    pairs: dict[str, PlainPair] = {}
    for key in state:
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            lora_A = state[key]
            alpha = float(state.get(f"{stem}.alpha", torch.tensor(float(lora_A.shape[0]))))
            pairs[names.get(stem, stem)] = (lora_A, state.get(f"{stem}.lora_up.weight", torch.empty(0)), alpha)
    put_pairs(model, expert, pairs, where=str(path))


def put_pairs(model: nn.Module, expert: str, pairs: Mapping[str, PlainPair], *, where: str) -> None:
    """Make channel pairs the factors of an expert; layers that the file lacks get rank 0 of it.

    Raises:
        UnknownNameError: no such expert.
        CheckpointError: layers or shapes that do not fit, all of them listed; nothing is changed then.
    """
    layers, roster = dict(expert_layers(model)), roster_of(model)
    if expert not in roster:
        raise UnknownNameError("expert", expert, roster)
    faults = [f"{name}: no such expert layer; the nearest are {nearest_names(name, layers)}" for name in pairs if name not in layers]
    for name, (lora_A, lora_B, _) in pairs.items():
        if name in layers:
            try:
                layers[name].check_factors(lora_A, lora_B)
            except InputError as error:
                faults.append(f"{name}: {error.came}; accepted: {error.accepted}")
    if faults or not pairs:
        raise CheckpointError(where, f"{len(faults) or 'no'} layers", "pairs of this network's expert layers", "see each", faults=faults)
    for name, layer in layers.items():
        if name in pairs:
            lora_A, lora_B, alpha = pairs[name]
            layer.set_factors(expert, lora_A, lora_B, scaling=alpha / lora_A.shape[0])
        else:
            layer.drop_factors(expert)
