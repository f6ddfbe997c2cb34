"""What a case will cost: windows, experts, label groups and bytes, from the image's header alone (no torch).

The sizes are upper bounds: the crop to the body, known only once the voxels are read, makes them smaller.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from medlore.data.volumes.geometry import Array, Shape, reorientation_to, resampling_to
from medlore.data.volumes.window_grid import WindowGrid
from medlore.errors import InputError
from medlore.models.segmenter.encoders import ENCODERS, UNET
from medlore.segmenting.expectations import CheckLevel
from medlore.segmenting.sweep import axis_order, open_rows, sweep_axis

# Python, torch, NumPy and what they keep once a network has run, before any weight
_INTERPRETER_BYTES = 375 << 20
_WINDOW_CHANNELS = 6  # a window of three channels, and its copy in the network's layout
_DEVICE_BYTES = 500 << 20  # a CUDA context and the work space of its libraries
_FILE_BYTES = 4  # a voxel of the image as it was read; float64 takes eight
_NETWORK_BYTES = 5  # a voxel of the network's grid: its grey value, and whether it is body
_PREPARING = {"ct": 6, "other": 9}  # the same while grey values are chosen; percentiles sort a copy
_WRITING_BYTES = 2  # a voxel of the canvas of masks, or of the label map
_RESTORING_BYTES = 200  # a voxel of one plane of the image: sixteen planes at a time, in the steps of an interpolation
_TISSUE_WORK = 9  # bytes per voxel of the network's grid: the sum of the tissues, where it is enough, and those places
_OTHER_LOOK = 8  # bytes per voxel of the network's grid: the image again, padded by half a window, and whether it is body
_JUDGING = 6  # bytes per voxel of the grid of the masks: the number of its connected piece, the brain, and the structure
_ONEDNN_MACHINES = ("x86_64", "amd64")
Grid = Literal["original", "processed"]


@dataclass(frozen=True)
class NetworkSize:
    """What the plan must know of a model.

    Args:
        channels: of the full-resolution maps.
        parameters: of one merged network.
        merged_parameters: of those that an expert has for itself.
        encoder: which one, a key of `ENCODERS`.
    """

    channels: int
    parameters: int
    merged_parameters: int
    encoder: str = UNET


@dataclass(frozen=True)
class WindowRules:
    """How a volume is cut and summed.

    Args:
        roi_size: window.
        overlap: of neighbouring windows.
        spacing_mm: of the network's grid.
        orientation_code: of the network's grid.
        sw_batch_size: windows at a time.
        bytes_per_number: 2 for half precision in the network.
        published: float32 sums.
    """

    roi_size: Shape
    overlap: float
    spacing_mm: tuple[float, float, float]
    orientation_code: str = "RAS"
    sw_batch_size: int = 1
    bytes_per_number: int = 4
    published: bool = False


@dataclass(frozen=True)
class Extras:
    """What is made of a case beside its masks.

    Args:
        check: how closely the masks are looked at.
        labels: that were asked for.
        judged: whether the pack states what to expect, so that pieces are counted.
        probabilities: whether the probability of each label is kept.
        uncertainty: whether the entropy of every voxel is kept.
    """

    check: CheckLevel = "none"
    labels: int = 0
    judged: bool = False
    probabilities: bool = False
    uncertainty: bool = False

    def network_bytes(self, voxels: int) -> int:
        """On the network's grid, from the first window on: maps of a byte a voxel; other looks at the image with their masks."""
        maps = self.labels * self.probabilities + self.uncertainty
        thorough = _OTHER_LOOK if self.check == "thorough" else 0
        return voxels * (maps + thorough) + voxels * (2 * self.labels if thorough else 0) // 8

    def judging_bytes(self, voxels: int) -> int:
        """On the grid of the masks, once they are done."""
        return voxels * _JUDGING if self.judged else 0


@dataclass(frozen=True)
class DeviceShare:
    """What a case takes on a GPU.

    Args:
        fixed_bytes: one network and its maps.
        bytes_per_label: the band of sums of one label.
        memory_bytes: what may be used there.
    """

    fixed_bytes: int
    bytes_per_label: int
    memory_bytes: int

    def needed(self, labels: int) -> int:
        """Bytes for so many labels at a time."""
        return self.fixed_bytes + labels * self.bytes_per_label


@dataclass(frozen=True)
class HostShare:
    """What a case takes of the host's memory, step by step; the steps do not overlap, so the largest counts.

    Args:
        resting_bytes: what is there all the time: programs, weights, the image, and the masks of every label, finished or not.
        volume_bytes: the image on the network's grid, from its preparation on.
        maps_bytes: the network's maps; 0 where a GPU holds them.
        band_bytes: the open rows of one label. A pass ends with as many finished rows beside them, when the maps are gone.
        preparing_bytes: most that is needed before the first window, beyond what rests.
        writing_bytes: most that is needed after the last, beyond what rests and the volume.
        restoring_bytes: for the way of finished rows back to the grid of the image.
    """

    resting_bytes: int
    volume_bytes: int
    maps_bytes: int
    band_bytes: int
    preparing_bytes: int
    writing_bytes: int
    restoring_bytes: int

    def needed(self, labels: int) -> int:
        """Bytes for so many labels at a time."""
        finishing = 2 * labels * self.band_bytes + self.restoring_bytes
        running = self.volume_bytes + max(self.maps_bytes + labels * self.band_bytes, finishing, self.writing_bytes)
        return self.resting_bytes + max(self.preparing_bytes, running)

    def fitting(self, memory_bytes: int) -> int:
        """How many labels fit at a time; 0 where not one does."""
        if self.needed(0) > memory_bytes:
            return 0
        left = memory_bytes - self.resting_bytes - self.volume_bytes
        return max(0, min((left - self.maps_bytes) // self.band_bytes, (left - self.restoring_bytes) // (2 * self.band_bytes)))


@dataclass(frozen=True)
class CasePlan:
    """What one case will do and cost.

    Args:
        shape: on the network's grid before the crop.
        rules: windows and grid.
        tissues: labels whose probabilities are kept on the network's grid, so that their borders can be redrawn.
        grid: on which the masks are wanted.
        axis: of the network's grid along which the windows go; only the rows of a window along it are open at a time.
        windows: how many, at most, for each pass.
        groups: for each region its labels, in groups that fit the memory; each group is one pass over the windows.
        host: what is needed of the host's memory.
        memory_bytes: what may be used of it.
        device: the same for a GPU, which holds weights, maps and bands.
        extras: what is made beside the masks.
    """

    shape: Shape
    rules: WindowRules
    tissues: tuple[str, ...]
    grid: Grid
    axis: int
    windows: int
    groups: dict[str, list[list[str]]]
    host: HostShare
    memory_bytes: int
    device: DeviceShare | None = None
    extras: Extras = Extras()

    @property
    def labels(self) -> int:
        """Number of labels."""
        return sum(len(group) for groups in self.groups.values() for group in groups)

    @property
    def largest(self) -> int:
        """Labels of the largest group."""
        return max((len(group) for groups in self.groups.values() for group in groups), default=0)

    @property
    def passes(self) -> int:
        """How often the windows are gone through."""
        return sum(len(groups) for groups in self.groups.values())

    @property
    def fixed_bytes(self) -> int:
        """What is needed whatever the number of labels at a time."""
        return self.host.needed(0)

    @property
    def bytes_per_label(self) -> int:
        """What each label at a time adds."""
        return self.host.band_bytes

    @property
    def peak_bytes(self) -> int:
        """Expected peak memory."""
        return self.host.needed(self.largest)

    def record(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "network_shape_before_crop": list(self.shape),
            "axis": self.axis,
            "windows_at_most": self.windows,
            "passes": self.passes,
            "experts": {region: [len(group) for group in groups] for region, groups in self.groups.items()},
            "labels": self.labels,
            "fixed_bytes": self.fixed_bytes,
            "bytes_per_label": self.bytes_per_label,
            "expected_peak_bytes": self.peak_bytes,
            "memory_bytes": self.memory_bytes,
            "device": None if self.device is None else asdict(self.device),
            "check": self.extras.check,
        }

    def in_words(self) -> str:
        """One line for people."""
        experts = ", ".join(f"{region} ({sum(map(len, groups))})" for region, groups in self.groups.items())
        size = " x ".join(map(str, self.shape))
        device = self.device
        looks = ", gone through three times (--check thorough)" if self.extras.check == "thorough" else ""
        on_device = "" if device is None else f", and {gib(device.needed(self.largest))} of {gib(device.memory_bytes)} on the device"
        return (
            f"{size} on the network's grid, at most {self.windows} windows x {self.passes} pass(es){looks}; labels by expert: {experts}; "
            f"about {gib(self.peak_bytes)} of {gib(self.memory_bytes)}{on_device}"
        )


def plan_case(  # noqa: PLR0913 - each is a fact of the case or of the machine
    shape: Shape,
    affine: Array,
    routes: Mapping[str, Sequence[str]],
    size: NetworkSize,
    rules: WindowRules,
    *,
    memory_bytes: int,
    where: str,
    device_memory_bytes: int | None = None,
    tissues: Sequence[str] = (),
    grid: Grid = "original",
    modality: str = "ct",
    voxel_bytes: int = _FILE_BYTES,
    extras: Extras = Extras(),
) -> CasePlan:
    """The plan of one case.

    Args:
        shape: of the file.
        affine: of the file.
        routes: region -> labels.
        size: of the model.
        rules: windows and grid.
        memory_bytes: what may be used.
        where: name of the image, for the error.
        device_memory_bytes: what may be used on the GPU that runs the network; None where the processor does.
        tissues: labels whose probabilities are kept on the network's grid.
        grid: on which the masks are wanted.
        modality: chooses the intensity rule.
        voxel_bytes: of a voxel as it was read.
        extras: what is made beside the masks.

    Raises:
        InputError: not even one label fits; the message says what would.
    """
    turn = reorientation_to(rules.orientation_code, affine, shape)
    change = resampling_to(rules.spacing_mm, turn.apply_to_affine(affine), turn.new_shape)
    windows = WindowGrid(change.new_shape, rules.roi_size, rules.overlap)
    voxels, processed = math.prod(shape), math.prod(change.new_shape)
    maps = _live_maps(size, rules, on_device=device_memory_bytes is not None) * size.channels + _WINDOW_CHANNELS
    network = int(rules.sw_batch_size * math.prod(rules.roi_size) * rules.bytes_per_number * maps)
    weights = 4 * (size.parameters + size.merged_parameters * max(len(routes), 1))
    ready = rules.bytes_per_number * size.parameters  # the network in the layout or on the device that runs it
    axis = sweep_axis(change.new_shape, rules.roi_size)
    band = open_rows(change.new_shape, rules.roi_size, axis) * (8 if rules.published else 2)
    mask_grid = turn.new_shape if grid == "original" else change.new_shape
    last = mask_grid[axis_order(axis)[2]]  # whose rows of bits are filled up to whole bytes
    bits = math.prod(mask_grid) // last * -(-last // 8) * sum(map(len, routes.values()))
    host = HostShare(
        resting_bytes=_INTERPRETER_BYTES + weights + bits + voxels * voxel_bytes + (ready if device_memory_bytes is None else 0),
        volume_bytes=processed * (_NETWORK_BYTES + (2 * len(tissues) + _TISSUE_WORK if tissues else 0)) + extras.network_bytes(processed),
        maps_bytes=network if device_memory_bytes is None else 0,
        band_bytes=band,
        preparing_bytes=processed * _PREPARING.get(modality, _PREPARING["other"]),
        writing_bytes=max(math.prod(mask_grid) * _WRITING_BYTES, extras.judging_bytes(math.prod(mask_grid))),
        restoring_bytes=math.prod(mask_grid) // mask_grid[axis] * _RESTORING_BYTES,
    )
    fitting = host.fitting(memory_bytes)
    if fitting < 1:
        raise _too_large(f"{where}: --memory", memory_bytes, host.needed(1), "--memory {least} or more, or smaller windows")
    device = None
    if device_memory_bytes is not None:
        device = DeviceShare(_DEVICE_BYTES + network + ready, int(1.5 * band), device_memory_bytes)
        on_device = (device.memory_bytes - device.fixed_bytes) // device.bytes_per_label
        if on_device < 1:
            raise _too_large(f"{where}: memory of the device", device.memory_bytes, device.needed(1), "smaller windows")
        fitting = min(fitting, on_device)
    groups = {region: _split(list(labels), fitting) for region, labels in routes.items()}
    return CasePlan(change.new_shape, rules, tuple(tissues), grid, axis, len(windows.windows()), groups, host, memory_bytes, device, extras)


def _live_maps(size: NetworkSize, rules: WindowRules, *, on_device: bool) -> float:
    encoder = ENCODERS[size.encoder]
    here = not rules.published and not on_device and platform.machine().lower() in _ONEDNN_MACHINES
    if here and encoder.ready is not None:
        return encoder.live_maps.ready
    return encoder.live_maps.full if rules.bytes_per_number == 4 else encoder.live_maps.half


def _too_large(where: str, memory_bytes: int, needed: int, fix: str) -> InputError:
    least = gib(math.ceil(needed * 1.05))
    fix = f"give {fix.format(least=least.replace(' ', ''))} (--roi-size, --sw-batch-size)"
    return InputError(where, f"{gib(memory_bytes)}", f"at least {least} for one label at a time", fix)


def gib(size: int) -> str:
    """Bytes for people.

    Examples:
        >>> gib(3 << 30), gib(1500)
        ('3.0 GiB', '1 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{max(round(size / 2**20), 1)} MiB"


def _split(labels: list[str], most: int) -> list[list[str]]:
    """Groups of nearly equal size."""
    count = math.ceil(len(labels) / most)
    size = math.ceil(len(labels) / count)
    return [labels[i : i + size] for i in range(0, len(labels), size)]
