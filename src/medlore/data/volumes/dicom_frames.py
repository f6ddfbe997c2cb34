"""Enhanced multi-frame objects (CT, MR, PET): every frame as if it were an image of its own, and the volumes that they make up.

Where a frame lies and what its numbers mean stands in groups of the header, shared by all frames or per frame. An object may hold
several volumes (time points, echoes, b-values, stacks): its dimensions say which frame belongs to which, else the order in which
frames come at the same place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medlore.data.volumes.dicom_files import DicomFile
from medlore.errors import DataError, MedloreError, reason_of

# group of the header -> the attributes that a single-frame image has in its place
_GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
_PER_FRAME, _SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
# dimensions that say where a frame lies in its stack, not to which volume it belongs: position in stack, position in space, stack
_PLACES = frozenset({0x00209057, 0x00200032, 0x00209056})
_MOST_FRAMES = 100_000


def is_multi_frame(file: DicomFile) -> bool:
    """Whether an image object holds several frames, each with a place of its own."""
    return file.number("NumberOfFrames", 1) > 1 or _PER_FRAME in file.header


def frames_of(file: DicomFile) -> list[DicomFile]:
    """The frames of an enhanced object, each with the attributes of a single-frame image and its number (from 0).

    Raises:
        DataError: frames without groups (a cine), or as many groups as there are no frames.
    """
    count = int(file.number("NumberOfFrames", 1))
    groups = file.header.get(_PER_FRAME)
    if not groups or not 1 <= count <= _MOST_FRAMES or len(groups) != count:
        came = f"{count} frames with {len(groups or ())} groups that say where they lie"
        raise DataError(str(file.source), came, "an enhanced image with a place for every frame", "convert it with dcm2niix")
    try:
        bare, shared = _copied(file.header), file.header.get(_SHARED)
        for name in (_PER_FRAME, _SHARED, "NumberOfFrames"):
            if name in bare:
                delattr(bare, name)
        return [replace(file, header=_alone(bare, shared, own, index), frame=index) for index, own in enumerate(groups)]
    except MedloreError:
        raise
    except Exception as error:  # pydicom decodes values when they are asked for
        came = f"groups of frames that cannot be used ({reason_of(error)})"
        raise DataError(str(file.source), came, "what the DICOM standard says", "export it again") from error


def _alone(bare: Any, shared: Any, own: Any, index: int) -> Any:
    """The header of one frame: that of the object, and what its groups say."""
    made = _copied(bare)
    for group, names in _GROUPS.items():
        items: Any = own.get(group) or (shared[0].get(group) if shared else ())
        for item in items or ():
            for name in names:
                if name in item:
                    setattr(made, name, item.get(name))
    for item in own.get("FrameContentSequence") or ():
        if "DimensionIndexValues" in item:
            made.DimensionIndexValues = item.DimensionIndexValues
    made.ReferencedFrameNumber = index + 1  # how others refer to it
    return made


def _copied(header: Any) -> Any:
    """A data set of the same elements; `copy.copy` would share them, and what is set in one would stand in the other."""
    from pydicom.dataset import Dataset

    made = Dataset()
    for tag in header.keys():  # noqa: SIM118 - a data set yields its elements
        made[tag] = header[tag]
    return made


def one_volume(frames: Sequence[DicomFile], frame: int | None, path: Path) -> list[DicomFile]:
    """The frames of the one volume, or of the one that is asked for.

    Args:
        frames: of all objects of a series.
        frame: number of the volume, from 0, where there are several.
        path: for the message.

    Raises:
        DataError: several volumes and none is named, or no such number.
    """
    found = _volumes(frames, path)
    if frame is None and len(found) == 1:
        return found[0]
    if frame is None or not 0 <= frame < len(found):
        came = f"{len(found)} volumes in one series" + ("" if frame is None else f", of which frame {frame} was asked for")
        fix = 'add "frame": N to the case, or give --frame N'
        raise DataError(str(path), came, f"the number of one, from 0 to {len(found) - 1}", fix)
    return found[frame]


def _volumes(frames: Sequence[DicomFile], path: Path) -> list[list[DicomFile]]:
    """The volumes: in each direction, the n-th frame at every place is of the n-th volume; dimensions say which comes first.

    StackID is not looked at: converters number every frame as a stack of its own.
    """
    stacks: dict[tuple[float, ...], dict[tuple[float, ...], list[DicomFile]]] = defaultdict(lambda: defaultdict(list))
    for file in frames:
        turned = tuple(round(v, 2) for v in file.numbers("ImageOrientationPatient", 6) or ())
        place = tuple(round(v, 2) for v in file.numbers("ImagePositionPatient", 3) or ())
        stacks[turned][place].append(file)
    found = []
    for places in stacks.values():
        counts = {len(files) for files in places.values()}
        if len(counts) > 1:
            came = f"{min(counts)} frames at some places and {max(counts)} at others"
            raise DataError(str(path), came, "as many frames at every place", "export it again, or convert it with dcm2niix")
        ordered = [sorted(files, key=_time) for files in places.values()]
        found += [[files[n] for files in ordered] for n in range(counts.pop())]
    return found


def _time(file: DicomFile) -> tuple[Any, ...]:
    """What comes first at one place: the dimensions that are none of space, then the order of the frames."""
    pointers = [int(item.DimensionIndexPointer) for item in file.header.get("DimensionIndexSequence") or ()]
    values = file.header.get("DimensionIndexValues") or ()
    values = [values] if isinstance(values, int) else list(values)
    apart = [v for pointer, v in zip(pointers, values, strict=False) if pointer not in _PLACES]
    return (*apart, file.number("InstanceNumber", 0), file.frame or 0) if len(pointers) == len(values) else (file.frame or 0,)
