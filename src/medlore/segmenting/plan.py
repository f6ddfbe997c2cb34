"""What a case will cost: windows, experts, label groups and bytes, from the image's header alone (no torch).

The sizes are upper bounds: the crop to the body, known only once the voxels are read, makes them smaller.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medlore.data.volumes.geometry import Array, Shape, reorientation_to, resampling_to
from medlore.data.volumes.window_grid import WindowGrid
from medlore.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_INTERPRETER_BYTES = 350 << 20  # Python, torch, NumPy and the rest, before any weight
_AVAILABLE_SHARE = 0.8
_DEVICE_BYTES = 500 << 20  # a CUDA context and the work space of its libraries
# Full-resolution maps that are alive at the widest point of the U-Net (skip, upsampled, both concatenated, convolved,
# normalised, and the convolution's own copy), counted in the channels of the first stage; measured, see docs/segment.md.
_LIVE_MAPS = {4: 8.0, 2: 11.0}  # by bytes per number; half precision holds converted weights too
_LIVE_MAPS_READY = 6.5  # of `models.unet3d_inference`, which runs on a processor with oneDNN
_TISSUE_WORK = 9  # bytes per voxel of the network's grid: the sum of the tissues, where it is enough, and those places
_ONEDNN_MACHINES = ("x86_64", "amd64")


@dataclass(frozen=True)
class NetworkSize:
    """What the plan must know of a model.

    Args:
        channels: of the full-resolution maps.
        parameters: of one merged network.
        merged_parameters: of those that an expert has for itself.
    """

    channels: int
    parameters: int
    merged_parameters: int


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
class CasePlan:
    """What one case will cost.

    Args:
        shape: on the network's grid before the crop.
        windows: how many, at most, for each pass.
        groups: for each region its labels, in groups that fit the memory; each group is one pass over the windows.
        fixed_bytes: weights, volume and the network's maps.
        bytes_per_label: band and masks of one label.
        memory_bytes: what may be used.
        device: the same three numbers for a GPU, which holds weights, maps and bands; the host then holds the rest.
    """

    shape: Shape
    windows: int
    groups: dict[str, list[list[str]]]
    fixed_bytes: int
    bytes_per_label: int
    memory_bytes: int
    device: DeviceShare | None = None

    @property
    def labels(self) -> int:
        """Number of labels."""
        return sum(len(group) for groups in self.groups.values() for group in groups)

    @property
    def passes(self) -> int:
        """How often the windows are gone through."""
        return sum(len(groups) for groups in self.groups.values())

    @property
    def peak_bytes(self) -> int:
        """Expected peak memory."""
        largest = max((len(group) for groups in self.groups.values() for group in groups), default=0)
        finished = self.labels - largest
        return self.fixed_bytes + largest * self.bytes_per_label + finished * self.bytes_per_label // 8

    def record(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "network_shape_before_crop": list(self.shape),
            "windows_at_most": self.windows,
            "passes": self.passes,
            "experts": {region: [len(group) for group in groups] for region, groups in self.groups.items()},
            "labels": self.labels,
            "fixed_bytes": self.fixed_bytes,
            "bytes_per_label": self.bytes_per_label,
            "expected_peak_bytes": self.peak_bytes,
            "memory_bytes": self.memory_bytes,
            "device": None if self.device is None else asdict(self.device),
        }

    def in_words(self) -> str:
        """One line for people."""
        experts = ", ".join(f"{region} ({sum(map(len, groups))})" for region, groups in self.groups.items())
        size = " x ".join(map(str, self.shape))
        largest = max((len(group) for groups in self.groups.values() for group in groups), default=0)
        device = self.device
        on_device = "" if device is None else f", and {gib(device.needed(largest))} of {gib(device.memory_bytes)} on the device"
        return (
            f"{size} on the network's grid, at most {self.windows} windows x {self.passes} pass(es); labels by expert: {experts}; "
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
    tissues: int = 0,
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
        tissues: how many labels' probabilities are kept on the network's grid (`segment_tissues`).

    Raises:
        InputError: not even one label fits; the message says what would.
    """
    turn = reorientation_to(rules.orientation_code, affine, shape)
    change = resampling_to(rules.spacing_mm, turn.apply_to_affine(affine), turn.new_shape)
    grid = WindowGrid(change.new_shape, rules.roi_size, rules.overlap)
    voxels, processed = math.prod(shape), math.prod(change.new_shape)
    network = (
        rules.sw_batch_size
        * math.prod(rules.roi_size)
        * rules.bytes_per_number
        * (_live_maps(rules, on_device=device_memory_bytes is not None) * size.channels)
    )
    weights = 4 * (size.parameters + size.merged_parameters * max(len(routes), 1))
    ready = rules.bytes_per_number * size.parameters  # the network in the layout or on the device that runs it
    band = min(rules.roi_size[0], change.new_shape[0]) * change.new_shape[1] * change.new_shape[2]
    sums, bits = int(band * (8 if rules.published else 2) * 1.5), voxels // 8
    host = int(_INTERPRETER_BYTES + weights + voxels * 4 + processed * 6 + 2 * voxels)
    host += processed * (2 * tissues + _TISSUE_WORK) if tissues else 0
    device = None
    if device_memory_bytes is None:
        fixed, per_label = host + int(network) + ready, sums + bits
    else:
        fixed, per_label = host, sums + bits  # finished rows come back to the host
        device = DeviceShare(_DEVICE_BYTES + int(network) + ready, sums, device_memory_bytes)
        _fitting(device.memory_bytes, device.fixed_bytes, device.bytes_per_label, f"{where}: memory of the device", "smaller windows")
    fitting = _fitting(memory_bytes, fixed, per_label, f"{where}: --memory", "--memory {least} or more, or smaller windows")
    if device is not None:
        fitting = min(fitting, (device.memory_bytes - device.fixed_bytes) // device.bytes_per_label)
    groups = {region: _split(list(labels), fitting) for region, labels in routes.items()}
    return CasePlan(change.new_shape, len(grid.windows()), groups, fixed, per_label, memory_bytes, device)


def _live_maps(rules: WindowRules, *, on_device: bool) -> float:
    ready = not rules.published and not on_device and platform.machine().lower() in _ONEDNN_MACHINES
    return _LIVE_MAPS_READY if ready else _LIVE_MAPS[rules.bytes_per_number]


def _fitting(memory_bytes: int, fixed: int, per_label: int, where: str, fix: str) -> int:
    """How many labels fit at a time."""
    count = (memory_bytes - fixed) // per_label
    if count < 1:
        least = gib(math.ceil((fixed + per_label) * 1.05))
        fix = f"give {fix.format(least=least.replace(' ', ''))} (--roi-size, --sw-batch-size)"
        raise InputError(where, f"{gib(memory_bytes)}", f"at least {least} for one label at a time", fix)
    return count


def read_bytes(text: str, *, where: str = "--memory") -> int:
    """Bytes of a size such as `6GiB`, `500MB` or `2e9`.

    Raises:
        InputError: not a size.

    Example:
        >>> read_bytes("6GiB") == 6 * 2**30
        True
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text, flags=re.IGNORECASE)
    value = float(found[1]) * _UNITS[(found[2] or "").lower()] if found and found[1].count(".") < 2 else 0
    if value < 1:
        raise InputError(where, f"got {text!r}", "a size such as 6GiB or 500MB", "write a number and a unit")
    return int(value)


def available_memory() -> int:
    """Bytes that may be used by default: four fifths of what is free, or of what the container may still take."""
    free = _meminfo() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            left = int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text())
        except (OSError, ValueError):  # no such group, or the word "max"
            continue
        free = min(free, max(left, 0)) if left < free else free
    return usable(free)


def usable(free: int) -> int:
    """What is taken of free bytes by default."""
    return int(free * _AVAILABLE_SHARE)


def gib(size: int) -> str:
    """Bytes for people.

    Example:
        >>> gib(3 << 30), gib(1500)
        ('3.0 GiB', '1 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{max(round(size / 2**20), 1)} MiB"


def _meminfo() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _split(labels: list[str], most: int) -> list[list[str]]:
    """Groups of nearly equal size."""
    count = math.ceil(len(labels) / most)
    size = math.ceil(len(labels) / count)
    return [labels[i : i + size] for i in range(0, len(labels), size)]
