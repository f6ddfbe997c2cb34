"""Stray parts of a structure: what is small beside its largest part is dropped, where the pack says so.

A pack may name structures that come in one piece or in a pair of like size (`preprocessing.parts`, e.g. `mri: {hippocampus: 0.5}`):
connected parts with less than that share of the largest part's voxels are then no part of the answer.
"""

from __future__ import annotations

from medlore.data.volumes.geometry import Array
from medlore.data.volumes.preparation import PackedMasks


def without_stray_parts(masks: PackedMasks, index: int, share: float) -> tuple[PackedMasks, int]:
    """The same mask without its small parts, and its index; the given masks stay as they are.

    Args:
        masks: packed masks.
        index: which of them.
        share: of the largest part's voxels that a part must have; parts that touch by a corner are one.
    """
    found = masks.boxed(index)
    if found is None:
        return masks, index
    crop, mask = found
    kept = PackedMasks(masks.shape, 1)
    rows, columns = (slice(first, last) for first, last in zip(crop.start[1:], crop.stop[1:], strict=True))
    kept.set_planes(0, crop.start[0], (rows, columns), large_parts(mask, share))
    return kept, 0


def large_parts(mask: Array, share: float) -> Array:
    """Connected parts (26 neighbours) that have at least `share` of the voxels of the largest.

    Example:
        >>> import numpy as np
        >>> large_parts(np.array([[[1, 1, 1, 0, 1, 0, 1, 1]]], bool), 0.5).astype(int).tolist()
        [[[1, 1, 1, 0, 0, 0, 1, 1]]]
    """
    import numpy as np
    from scipy import ndimage

    parts, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(parts.reshape(-1))
    sizes[0] = 0
    large = (sizes >= share * sizes.max()) & (sizes > 0)
    return np.asarray(large[parts])
