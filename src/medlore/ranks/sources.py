"""Where weights come from: a module, or a file in any of the usual containers, read one tensor at a time.

No pickle is executed: `.pth`, `.pt` and `.bin` files go through `torch.load(weights_only=True)`, memory-mapped where the
format allows it; `.npz` files through `numpy.load(allow_pickle=False)`; `.safetensors` files are streamed.
"""

from __future__ import annotations

import re
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from medlore.assets import PREFIX, asset_path
from medlore.errors import CheckpointError, InputError
from medlore.files import existing_file, read_json, refuse_device
from medlore.ranks.model_folders import adapter_in_place_of_a_model, check_counts, read_config, refuse_a_tuned_model
from medlore.ranks.quantised import dequantised, is_quantised
from medlore.ranks.roles import split_name
from medlore.weightfiles import TORCH_SUFFIXES, broken_file, check_header, load_torch_file, unwrapped

if TYPE_CHECKING:
    from medlore.ranks.fused_rows import Orders
    from medlore.ranks.places import Kind

_PREFIXES = ("module.", "backbone.", "encoder.", "model.", "base_encoder.", "_orig_mod.")
_FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ACCEPTED = "a .safetensors, .bin, .pth, .pt or JAX .npz file, a transformers folder or hub name, or medlore:vit-mini"


class WeightSource(ABC):
    """Named tensors that are read one at a time.

    Attributes:
        label: how messages and plans call the source.
        shapes: tensor name -> shape as rows (out) and columns (in); names are those of the model, wrappers and prefixes taken off.
        kinds: tensor name -> what its module is; None for files, which do not say.
        folder: the transformers folder, when the source is one.
        tied: tensor name -> the tensor whose values it shares.
        transposed: tensors that are stored in x out (GPT-2's `Conv1D`); they are read as out x in.
    """

    kinds: Mapping[str, Kind] | None = None
    folder: Path | None = None

    def __init__(self, label: str, shapes: Mapping[str, tuple[int, ...]], *, is_file: bool = True) -> None:
        self.label = label
        self._raw_names = _without_prefixes(shapes) if is_file else {name: name for name in shapes}
        self.tied: Mapping[str, str] = {}
        stored = {name: shapes[raw] for name, raw in self._raw_names.items()}
        self.transposed = self._stored_the_other_way(stored)
        self.shapes = {name: shape[::-1] if name in self.transposed else shape for name, shape in stored.items()}

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored (float16, bfloat16, float32 or float64; 8-bit weights times their scales), on the CPU."""
        tensor = self._stored(name)
        if is_quantised(tensor) and not tensor.is_meta:
            tensor = dequantised(self.label, name, tensor, self._raw_names, self._stored)
        return tensor.T if name in self.transposed else tensor

    def orders(self) -> Orders | None:
        """Identifies the rows of fused matrices by calling the module; None where there is no module to call."""
        if self.folder is None or not any(
            len(s) == 2 and len(split_name(n.removesuffix(".weight"))[2]) > 1 for n, s in self.shapes.items()
        ):
            return None
        from medlore.ranks.probing import short_probe

        return short_probe(self.folder)

    def _stored(self, name: str) -> Tensor:
        tensor = self._read(self._raw_names[name]).detach()
        return tensor if tensor.is_meta else tensor.cpu()

    def _stored_the_other_way(self, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
        """GPT-2's files: `c_attn` of width x 3·width gives away that every `c_` matrix is in x out."""
        fused = [shape for name, shape in shapes.items() if name.endswith("attn.c_attn.weight") and len(shape) == 2]
        if not fused or any(shape[1] != 3 * shape[0] for shape in fused):
            return frozenset()
        return frozenset(n for n, s in shapes.items() if len(s) == 2 and re.search(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$", n))

    def holds(self, raw_name: str) -> bool:
        """Whether a tensor is there under the name that it has in the file."""
        return raw_name in self._raw_names.values()

    @abstractmethod
    def _read(self, raw_name: str) -> Tensor: ...


class ModuleSource(WeightSource):
    """The parameters of a module in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tensors: dict[str, Tensor] = dict(model.named_parameters())
        self._scales = {n: b for n, b in model.named_buffers() if b is not None and n.endswith(("_scale", "_scale_inv", "SCB"))}
        super().__init__(type(model).__name__, {k: tuple(p.shape) for k, p in self._tensors.items()}, is_file=False)
        self.kinds = _module_kinds(model)
        first = {id(tensor): name for name, tensor in reversed(self._tensors.items())}
        every = model.named_parameters(remove_duplicate=False)
        self.tied = {name: first[id(tensor)] for name, tensor in every if name not in self._tensors}
        self.is_meta = any(p.is_meta for p in self._tensors.values())
        self._raw_names |= {name: name for name in self._scales}

    def orders(self) -> Orders | None:
        """By calling the attention modules; see `probing`."""
        from medlore.ranks.probing import FusedRowProbe

        return None if self.is_meta else FusedRowProbe(self.model)

    def _read(self, raw_name: str) -> Tensor:
        return self._scales[raw_name] if raw_name in self._scales else self._tensors[raw_name]

    def _stored(self, name: str) -> Tensor:
        tensor = super()._stored(name)
        state = getattr(self._tensors.get(name), "SCB", None)  # bitsandbytes keeps the scales of a row on the parameter
        if isinstance(state, Tensor) and tensor.dtype == torch.int8:
            return tensor.float() * state.detach().cpu().float().reshape(-1, 1) / 127
        return tensor

    def _stored_the_other_way(self, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
        names = {f"{path}.weight" for path, module in self.model.named_modules() if _is_conv1d(module)}
        return frozenset(names & set(shapes))


class SafetensorsSource(WeightSource):
    """One or several safetensors files, streamed tensor by tensor."""

    def __init__(self, label: str, files: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            check_header(path)
            try:
                with safe_open(path, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a mapping
                        self._files[name] = path
                        shapes[name] = tuple(opened.get_slice(name).get_shape())
            except SafetensorError as error:
                raise broken_file(path, f"not a whole safetensors file ({error})") from error
        super().__init__(label, shapes)

    def _read(self, raw_name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[raw_name], framework="pt") as opened:
            return cast("Tensor", opened.get_tensor(raw_name))


class TorchFileSource(WeightSource):
    """One or several files written by `torch.save`."""

    def __init__(self, label: str, files: Iterable[Path], *, averaged: bool = False) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path in files:
            self._tensors |= unwrapped(load_torch_file(path), path, averaged=averaged)
        super().__init__(label, {k: tuple(t.shape) for k, t in self._tensors.items()})
        places: dict[tuple[Any, ...], str] = {}
        self.tied = {}
        for name, raw in self._raw_names.items():
            tensor = self._tensors[raw]
            if tensor.ndim > 1 and tensor.numel():
                first = places.setdefault(
                    (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()), name
                )
                if first != name:
                    self.tied[name] = first

    def _read(self, raw_name: str) -> Tensor:
        return self._tensors[raw_name]


class JaxSource(WeightSource):
    """A ViT checkpoint of the JAX code (`Transformer/encoderblock_0/.../query/kernel`), seen as out x in matrices.

    Kernels are stored in x out, those of attention with the heads as an axis of their own: (d, heads, d_head) for query, key
    and value, (heads, d_head, d) for the output projection.
    """

    def __init__(self, label: str, path: Path) -> None:
        self._path = path
        self._members: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        with _open_npz(path) as archive:
            for member in archive.files:
                shape = _npz_shape(archive, member, path)
                name = member.removeprefix("opt/target/").replace("/", ".")
                if name.endswith(".kernel"):
                    name, shape = name.removesuffix("kernel") + "weight", _jax_shape(name, shape)
                self._members[name] = member
                shapes[name] = shape
        super().__init__(label, shapes)

    def _read(self, raw_name: str) -> Tensor:
        try:
            with _open_npz(self._path) as archive:
                kernel = archive[self._members[raw_name]]
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise broken_file(self.label, f"{self._members[raw_name]} cannot be read ({error})", _ACCEPTED) from error
        kernel = kernel.view(np.float16) if kernel.dtype.kind == "V" and kernel.dtype.itemsize == 2 else kernel
        shape = self.shapes[raw_name]
        if not raw_name.endswith(".weight"):
            return torch.from_numpy(np.ascontiguousarray(kernel))
        if len(shape) > 2:  # convolution: (height, width, in, out) -> (out, in, height, width)
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(kernel, (-1, -2), (0, 1))))
        return torch.from_numpy(np.ascontiguousarray(kernel.reshape(shape[1], shape[0]).T))


def open_source(source: nn.Module | str | Path, *, averaged: bool = False) -> WeightSource:
    """The weights behind a module, a path, a shipped name or a hub name.

    Args:
        source: one of these.
        averaged: of a torch file, the moving average that was saved beside the weights.

    Raises:
        InputError: no such file, or a kind of file that holds no weights.
        CheckpointError: the file is broken, or would run code when read.
    """
    if isinstance(source, nn.Module):
        refuse_a_tuned_model(source)
        return ModuleSource(source)
    label = str(source)
    if label.startswith(PREFIX):
        path = asset_path(label)
    else:
        path = Path(source)
        if is_hub_name(label):
            path = _from_hub(label)
    if path.is_dir():
        return _open_folder(label, path)
    opened = _open_file(label, existing_file(path), averaged=averaged)
    if opened.shapes and all("lora_" in name for name in opened.shapes):
        raise adapter_in_place_of_a_model(label, path.parent, _ACCEPTED)
    return opened


def _open_file(label: str, path: Path, *, averaged: bool = False) -> WeightSource:
    suffix = path.suffix.lower()
    if averaged and suffix not in TORCH_SUFFIXES:
        raise InputError("--ema", f"with {label}", f"a torch file ({', '.join(TORCH_SUFFIXES)}) that holds both", "leave it out")
    if suffix == ".safetensors":
        return SafetensorsSource(label, [path])
    if suffix == ".npz":
        return JaxSource(label, path)
    if suffix in TORCH_SUFFIXES:
        return TorchFileSource(label, [path], averaged=averaged)
    if path.name.endswith(".index.json"):
        return _open_shards(label, path)
    raise InputError(label, f"a file of type {suffix or 'without suffix'!r}", _ACCEPTED, "give the weights file itself")


def is_hub_name(label: str) -> bool:
    """Whether a text can only be meant as OWNER/NAME of a hub: nothing of this name is here, and no file is called so.

    Examples:
        >>> is_hub_name("facebook/dinov2-small"), is_hub_name("weights/model.safetensors"), is_hub_name("model")
        (True, False, False)
    """
    path = Path(label)
    called_a_file = path.suffix.casefold() in (*TORCH_SUFFIXES, ".safetensors", ".npz", ".npy", ".json")
    return re.fullmatch(r"[\w.-]+/[\w.-]+", label) is not None and not called_a_file and not path.exists()


def _open_folder(label: str, folder: Path) -> WeightSource:
    for file in folder.iterdir():
        refuse_device(file)
    present = [folder / name for name in _FOLDER_FILES if (folder / name).is_file()]
    if not present and (folder / "adapter_config.json").is_file():
        raise adapter_in_place_of_a_model(label, folder, _ACCEPTED)
    if not present:
        raise InputError(label, "a folder without weights", f"a folder with {' or '.join(_FOLDER_FILES)}", "name the weights file instead")
    source = _open_shards(label, present[0]) if present[0].suffix == ".json" else _open_file(label, present[0])
    config = read_config(folder)
    if config is not None:
        check_counts(config, tensors=len(source.shapes), values=source.parameters, where=label)
        source.folder = folder
    return source


def _open_shards(label: str, index: Path) -> WeightSource:
    listed = read_json(index)
    mapping = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(str(index), "no weight_map in it", "the index of a sharded checkpoint", "download the index again")
    names = sorted({str(name) for name in mapping.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(str(index), "shards in other folders", "files beside the index", "download it again", faults=outside)
    files = [index.parent / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(str(index), f"{len(missing)} shards are missing", "all files that it lists", "fetch them", faults=missing)
    source: WeightSource = SafetensorsSource(label, files) if files[0].suffix == ".safetensors" else TorchFileSource(label, files)
    if absent := sorted(str(name) for name in mapping if not source.holds(str(name))):
        came = f"{len(absent)} of {len(mapping)} tensors that it lists are in no shard"
        raise CheckpointError(str(index), came, "shards that hold every tensor of the index", "fetch the folder again", faults=absent)
    return source


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", *_FOLDER_FILES, "*.safetensors", "pytorch_model*.bin"]))  # nosec B615 # the user names it
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            name, f"no such file or folder here, and the hub does not give it ({reason})", _ACCEPTED, "check the spelling and the network"
        ) from error


def _open_npz(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise broken_file(path, "not a whole .npz archive", _ACCEPTED)
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise broken_file(path, f"not a whole .npz archive ({type(error).__name__})", _ACCEPTED) from error


def _npz_shape(archive: Any, member: str, path: Path) -> tuple[int, ...]:
    """Shape from the array's header alone: the data stay on disk."""
    try:
        with archive.zip.open(member + ".npy") as stream:
            version = np.lib.format.read_magic(stream)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return reader(stream)[0]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, struct.error) as error:
        raise broken_file(path, f"{member} cannot be read ({error})", _ACCEPTED) from error


def _jax_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in) of a dense kernel, (out, in, height, width) of a convolution."""
    if "Attention" in name and len(shape) == 3:
        inputs = shape[0] * shape[1] if name.endswith("out.kernel") else shape[0]
        return (int(np.prod(shape)) // inputs, inputs)
    return (shape[-1], shape[-2], *shape[:-2])


def _without_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Name without wrapper prefixes -> name as stored.

    A prefix goes when every matrix of every attention carries it, or every name does; `encoder.` stays where it is part of a
    transformers name (`encoder.layer.0`, `encoder.layers.0`).
    """
    mapping = {name: name for name in names}
    while True:
        marked = [n for n in mapping if re.search(r"\b(attn|self_attn|attention|self_attention)\b", n)] or list(mapping)
        prefix = next((p for p in _PREFIXES if marked and all(n.startswith(p) for n in marked)), None)
        if prefix is None or (prefix in ("encoder.", "model.") and not _is_wrapper(prefix, marked)):
            return mapping
        stripped = {n.removeprefix(prefix): raw for n, raw in mapping.items()}
        if len(stripped) < len(mapping):  # two names would become one
            return mapping
        mapping = stripped


def _is_wrapper(prefix: str, names: list[str]) -> bool:
    """`encoder.` and `model.` wrap a network whose own names are those of timm or mmpretrain; elsewhere they belong to it."""
    return all(re.match(rf"{re.escape(prefix)}(blocks|layers|stages|backbone|module|encoder)\.", n) for n in names) and any(
        re.search(r"attn\.(qkv|w_msa)", n) for n in names
    )


def _module_kinds(model: nn.Module) -> dict[str, Kind]:
    """Parameter name -> what its module is, as far as a factor pair is concerned."""
    kinds: dict[str, Kind] = {}
    for path, module in model.named_modules():
        stem = f"{path}." if path else ""
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            kinds[f"{stem}weight"] = "linear"
        elif isinstance(module, nn.MultiheadAttention):
            kinds[f"{stem}in_proj_weight"] = "linear"
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
            kinds[f"{stem}weight"] = "conv"
    return kinds


def _is_conv1d(module: nn.Module) -> bool:
    """Transformers' linear layer with weights in x out; recognised by name, so that transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
