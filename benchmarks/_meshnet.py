"""The public MeshNets (brainchop, MIT), run as their authors run them: a conformed volume, min-max greys, the box of the head.

Layout. `model.json` lists the layers (3x3x3 convolutions with dilation and ELU, a last 1x1x1), `model.bin` the float32 kernels one after
another, x y z in out. The input is the volume as FreeSurfer conforms it (256 cubed, 1 mm, uint8 greys, axes L I A) divided by its range,
cut to the box of what is brighter than a fifth of it, no padding; the largest part of the answer is kept. Orientations are compared on the
ICBM152 template by `python -m benchmarks.real_heads orient`. Source: parameters and pipeline of github.com/neuroneural/brainchop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from medlore.data.volumes.geometry import Array, reorientation_to, resampling_to
from medlore.data.volumes.nifti import Volume

CONFORMED = 256
ORIENTATION = "LIA"
_ROBUST = 0.999  # share of the voxels' greys that the conformed bytes hold
_BOX_ABOVE = 0.2


@dataclass(frozen=True)
class Layer:
    """A convolution.

    Args:
        weight: out in x y z.
        bias: out.
        dilation: along every axis.
    """

    weight: Tensor
    bias: Tensor
    dilation: int


def read_meshnet(folder: Path) -> tuple[list[Layer], list[str]]:
    """Layers and class names of a model folder."""
    model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    numbers = np.frombuffer((folder / "model.bin").read_bytes(), "<f4")
    weights, at = {}, 0
    for entry in (w for group in model["weightsManifest"] for w in group["weights"]):
        size = int(np.prod(entry["shape"]))
        weights[entry["name"]] = torch.from_numpy(numbers[at : at + size].reshape(entry["shape"]).copy())
        at += size
    convolutions = [c["config"] for c in model["modelTopology"]["model_config"]["config"]["layers"] if c["class_name"] == "Conv3D"]
    layers = [
        Layer(weights[f"{c['name']}/kernel"].permute(4, 3, 0, 1, 2).contiguous(), weights[f"{c['name']}/bias"], c["dilation_rate"][0])
        for c in convolutions
    ]
    return layers, list(json.loads((folder / "colormap.json").read_text(encoding="utf-8"))["labels"])


def conformed(volume: Volume, orientation: str = ORIENTATION) -> Array:
    """The volume at 1 mm in a cube of 256 voxels around its middle, greys 0 to 1 in 256 steps (x y z float32)."""
    turn = reorientation_to(orientation, volume.affine, volume.shape)
    change = resampling_to((1.0, 1.0, 1.0), turn.apply_to_affine(volume.affine), turn.new_shape)
    greys = change.apply(turn.apply(volume.array.astype(np.float32)))
    cube = np.zeros((CONFORMED,) * 3, np.float32)
    there, here = _middles(greys.shape)
    cube[there] = greys[here]
    low, high = float(cube.min()), float(np.quantile(cube, _ROBUST))
    return np.asarray(np.clip(np.rint((cube - low) * (255 / max(high - low, 1e-6))), 0, 255) / 255, np.float32)


def restored(labels: Array, volume: Volume, orientation: str = ORIENTATION) -> Array:
    """Labels of the cube on the volume's own grid (nearest voxel)."""
    turn = reorientation_to(orientation, volume.affine, volume.shape)
    change = resampling_to((1.0, 1.0, 1.0), turn.apply_to_affine(volume.affine), turn.new_shape)
    grid = np.zeros(change.new_shape, labels.dtype)
    there, here = _middles(grid.shape)
    grid[here] = labels[there]
    places = zip(turn.new_shape, change.step, grid.shape, strict=True)
    index = [np.clip(np.rint(np.arange(n) / step), 0, size - 1).astype(int) for n, step, size in places]
    return turn.undo(grid[np.ix_(*index)])


def _middles(shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a grid lies in the cube, and which part of it: middle on middle."""
    there, here = [], []
    for n in shape:
        offset = (CONFORMED - n) // 2
        there.append(slice(max(offset, 0), min(offset + n, CONFORMED)))
        here.append(slice(max(-offset, 0), max(-offset, 0) + min(n, CONFORMED)))
    return tuple(there), tuple(here)


@torch.no_grad()
def classes_of(layers: list[Layer], cube: Array) -> Array:
    """The class of each voxel of a conformed volume (x y z uint8); what lies outside of the box of the head is 0."""
    inside = np.argwhere(cube > _BOX_ABOVE)
    box = tuple(slice(int(a), int(b) + 1) for a, b in zip(inside.min(0), inside.max(0), strict=True))
    x = torch.from_numpy(cube[box])[None, None].contiguous(memory_format=torch.channels_last_3d)
    for layer in layers[:-1]:
        weight = layer.weight.contiguous(memory_format=torch.channels_last_3d)
        d = layer.dilation
        x = F.elu_(torch.mkldnn_convolution(x, weight, layer.bias, (d, d, d), (1, 1, 1), (d, d, d), 1))
    last = layers[-1]
    found = np.zeros(cube.shape, np.uint8)
    planes = [F.conv3d(x[:, :, i : i + 8], last.weight, last.bias).argmax(1)[0].numpy() for i in range(0, x.shape[2], 8)]
    found[box] = np.concatenate(planes).astype(np.uint8)
    return largest_part(found)


def largest_part(labels: Array) -> Array:
    """Labels without what is not connected with the largest part of all of them."""
    parts, count = ndimage.label(labels > 0)
    if count < 2:
        return labels
    sizes = np.bincount(parts.reshape(-1))
    sizes[0] = 0
    return np.where(parts == sizes.argmax(), labels, 0).astype(labels.dtype)
