"""A transformers folder seen from its configuration: what is in it, whether its numbers can be true, the network without values.

Nothing in a folder is ever executed: `trust_remote_code` is off everywhere, so a folder that brings its own code (`auto_map`) is read
by its weights' names alone where transformers does not know its kind.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medlore.errors import CheckpointError, InputError
from medlore.files import read_json

CONFIG_FILE = "config.json"
_LAYERS = ("layers", "layer", "depth", "depths", "blocks")
_WIDTHS = frozenset({"hidden_size", "intermediate_size", "embed_dim", "d_model", "n_embd", "dim", "mlp_dim", "ffn_dim", "hidden_dim"})
_SHORT = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers", "num_encoder_layers")
_MOST_WORDS, _MOST_VALUES = 512, 500_000_000  # of a network that is made to try one block of it
_NARROWEST = 16  # a label costs a row of the head; no network here is narrower


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a transformers folder; None where there is none, or one of another library (timm has no `model_type`)."""
    content = read_json_object(folder / CONFIG_FILE)
    return content if isinstance(content.get("model_type"), str) else None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file, or one that holds something else."""
    content = read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def timm_weights(folder: Path) -> Path | None:
    """The weights file of a folder that timm wrote for the hub; its names say what it is. None for any other folder or file."""
    content = read_json_object(folder / CONFIG_FILE)
    if "model_type" in content or not isinstance(content.get("architecture"), str):
        return None
    return next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()), None)


def refuse_own_code(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that names code beside the weights; nothing is asked and nothing of it is run.

    Raises:
        CheckpointError: it has an `auto_map`.
    """
    if named := config.get("auto_map"):
        first = next(iter(named.values()), "") if isinstance(named, Mapping) else named
        raise own_code(where, f"code of its own (auto_map: {first!s:.80})")


def own_code(where: str, came: str) -> CheckpointError:
    """What is said of a folder or hub name that wants its own code to be run."""
    fix = "use a model that transformers itself knows, or name the weights file alone"
    return CheckpointError(where, f"{came}, which is never executed", "a network that needs no code from its folder", fix)


def refuse_a_tuned_model(model: nn.Module) -> None:
    """The factors of a PEFT model are no weights to plan for, and its base has other names."""
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, Mapping) and configs:
        name, config = next(iter(configs.items()))
        base = getattr(config, "base_model_name_or_path", None) or type(getattr(model, "get_base_model", lambda: model)()).__name__
        came = f"a PEFT model already (adapter {name!r} on {base})"
        fix = "give its base: model.unload() takes the adapter off, merge_and_unload() merges it"
        raise InputError(type(model).__name__, came, "a model without adapters", fix)


def adapter_in_place_of_a_model(label: str, folder: Path, accepted: str) -> InputError:
    """What is said of an adapter that was given in place of a model."""
    base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
    fix = f"name its base, {base}" if base else "name the model that it was trained on"
    return InputError(label, "an adapter, not a model" + (f"; its base is {base}" if base else ""), accepted, fix)


def check_counts(config: Mapping[str, Any], *, tensors: int, values: int, where: str) -> None:
    """Refuse layers, widths and labels that weights of this size cannot have, before anything of their size is made.

    Args:
        config: as it stands in the file.
        tensors: number of tensors beside it.
        values: number of values in all of them.
        where: how the folder is called.

    Raises:
        CheckpointError: counts that cannot be true; all are listed.
    """
    faults = []
    for name, count in _counts(config):
        last = name.rpartition(".")[2]
        most = tensors if last.split("_")[-1] in _LAYERS else values // _NARROWEST if "label" in last else values
        if count > max(most, 1000):
            faults.append(f"{name}: {count}, for {tensors} tensors with {values} values")
    if faults:
        raise CheckpointError(
            f"{where}, {CONFIG_FILE}",
            f"{len(faults)} counts that its weights cannot have",
            "the configuration that belongs to these weights",
            "fetch the folder again",
            faults=faults,
        )


def meta_model(folder: Path) -> nn.Module | None:
    """The network of a transformers folder without values, or None for a kind that transformers does not know."""
    import transformers

    try:
        with _quietly(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)  # nosec B615 # a local folder
            return _built(config)
    except Exception:  # a configuration may hold anything, and each network fails at it in its own way
        return None


def short_model(folder: Path) -> nn.Module | None:
    """A network of the same kind and widths with one block, few words and random values, to try out how it reads its matrices."""
    import transformers

    try:
        with _quietly():
            config = copy.deepcopy(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))  # nosec B615 # a local folder
            for part in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))):
                _shorten(part)
            with torch.device("meta"):
                planned = _built(config)
            if planned is None or sum(p.numel() for p in planned.parameters()) > _MOST_VALUES:
                return None
            with torch.random.fork_rng(devices=[]):
                return _built(config)
    except Exception:  # as above
        return None


def _shorten(config: Any) -> None:
    for name in _SHORT:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)
    if isinstance(getattr(config, "vocab_size", None), int):
        config.vocab_size = min(config.vocab_size, _MOST_WORDS)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(value := getattr(config, name, None), int):
                setattr(config, name, value % config.vocab_size)


def _built(config: Any) -> nn.Module | None:
    import transformers

    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    model = transformers.AutoModel.from_config(config, trust_remote_code=False) if kind is None else kind(config)
    return model if isinstance(model, nn.Module) else None


def _counts(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    """Layers and labels at every level; widths of the network itself, since a half that is not in the files may be described too."""
    for key, value in config.items():
        name = f"{path}.{key}" if path else str(key)
        counts = str(key).split("_")[-1] in _LAYERS or "label" in str(key) or (not path and key in _WIDTHS)
        if isinstance(value, Mapping):
            if key in ("id2label", "label2id"):
                yield name, len(value)
            else:
                yield from _counts(value, name)
        elif counts and isinstance(value, int) and not isinstance(value, bool):
            yield name, value
        elif counts and isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            yield name, max(value)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what transformers has to say about configurations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
