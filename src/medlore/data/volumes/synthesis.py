"""Head images of any contrast, drawn from a label map: the labels stay exact whatever the scanner would have been.

Every structure gets a mean and a deviation, tissues that look alike mostly share theirs, left and right always do. Then
come texture of the soft parts, a bias field, gamma, resolution and noise. Codes are FreeSurfer's, with the numbers above
500 that the SynthSeg maps use for what lies outside of the brain.

Source: the idea of SynthSeg (Billot et al., Medical Image Analysis 2023); generator and priors are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from medlore.data.volumes.augmentation import along_axes, blur_matrix, smooth_field
from medlore.data.volumes.geometry import Array, Shape

TABLE = 1024  # codes below this are known
TOP = 255.0
# Codes of the right side -> those of the left, with which they share their grey values.
_LEFT = {41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 57: 25, 58: 26, 60: 28, 62: 30}
_LEFT |= {163: 136, 164: 137}
_FLUID = (4, 5, 14, 15, 24, 72)
# How far between grey (0) and white (1) matter a structure lies in most sequences.
_BETWEEN = {
    3: 0.0, 8: -0.02, 17: 0.02, 18: 0.0, 26: 0.05, 11: 0.1, 12: 0.25, 10: 0.5, 13: 0.75, 28: 0.7, 16: 0.75, 512: 0.75, 7: 0.95, 2: 1.0,
    25: 0.6, 85: 0.7, 136: -0.2, 137: -0.2,
}  # fmt: skip
_SORTED = (24, 2, 3, 7, 8)  # what partial volume mixes: outer fluid, white matter and cortex of cerebrum and cerebellum
_SORTED_SIDES = ((41, 2), (42, 3), (46, 7), (47, 8))
PointSpread = list[Array | None]  # a matrix an axis, None where nothing changes
FIRST_OUTSIDE = 500  # codes from here on lie outside of brain and fluid
OUTER_FLUID = 24
_SIDES = (((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1)))
_SOFT, _SKIN, _BONE, _MARROW, _EYE, _VEIN, _ARTERY, _CORD = 507, 511, 515, 516, 506, 514, 502, 512


@dataclass(frozen=True)
class SynthesisRules:
    """Plain numbers of the generator.

    Args:
        t1_like: the chance of a T1-like contrast (fluid < grey < white, bright fat).
        t2_like: of a T2-like one (white < grey < fluid).
        flair_like: of one with dark fluid and white below grey.
        independent: among the other contrasts, the chance that each structure is drawn for itself; else by tissue.
        jitter: deviation of a structure's mean around its tissue's, as a share of the distance of grey and white.
        deviation: smallest and largest deviation within a structure, of 255.
        skull_strip: the chance that what lies outside of the brain is taken away.
        ragged_strip: among these, the chance that it is done by a smooth mask that cuts into the cortex here and leaves skull there.
        bias: largest deviation of the bias field, in logarithms.
        gamma: deviation of the exponent's logarithm.
        blur_voxels: smallest and largest deviation of the point spread.
        thick_slices: the chance of slices thicker than a voxel.
        slice_voxels: the thickest.
        noise: largest deviation of the final noise, of 255.
        longer_neck: the chance that a field of view goes on below the label map: neck and shoulders, by its lowest plane.
    """

    t1_like: float = 0.4
    t2_like: float = 0.08
    flair_like: float = 0.07
    independent: float = 0.35
    jitter: float = 0.08
    deviation: tuple[float, float] = (1.0, 14.0)
    skull_strip: float = 0.35
    ragged_strip: float = 0.0
    bias: float = 0.3
    gamma: float = 0.2
    blur_voxels: tuple[float, float] = (0.35, 1.0)
    thick_slices: float = 0.25
    slice_voxels: float = 5.0
    noise: float = 8.0
    longer_neck: float = 0.0


@dataclass(frozen=True, eq=False)
class Contrast:
    """What a scanner would show of each code.

    Args:
        mean: code -> mean, 0 to 255 (length `TABLE`).
        deviation: code -> deviation.
        other_mean: code -> mean of the second kind of tissue under the same code (muscle and fat are both soft tissue).
        gamma: exponent of the finished image.
        family: how it was drawn.
    """

    mean: Array
    deviation: Array
    other_mean: Array
    gamma: float = 1.0
    family: str = field(default="random")

    @property
    def noisy_air(self) -> bool:
        """Whether air has values above 0, as most scanners give; else it was set to 0."""
        return bool(self.deviation[0] > 0 or self.mean[0] > 0)

    def draw(self, codes: Array, rng: np.random.Generator, *, texture: Array | None = None) -> Array:
        """Grey values of codes, of the same shape, float32, before blur and bias."""
        index = codes.astype(np.intp)
        image = self.mean.take(index)
        if texture is not None:
            np.copyto(image, self.other_mean.take(index), where=texture > 0)
        image += self.deviation.take(index) * rng.standard_normal(codes.shape, np.float32)
        return np.clip(image, 0, TOP, out=image)

    def correct(self, image: Array) -> Array:
        """The gamma curve."""
        return np.asarray(np.float32(TOP) * (np.clip(image, 0, None) * np.float32(1 / TOP)) ** np.float32(self.gamma))


def draw_contrast(rng: np.random.Generator, rules: SynthesisRules) -> Contrast:
    """A contrast for all codes."""
    chance = rng.random()
    limits = np.cumsum([rules.t1_like, rules.t2_like, rules.flair_like])
    family = ("t1", "t2", "flair", "random")[int(np.searchsorted(limits, chance, side="right"))]
    mean = rng.uniform(0, TOP, TABLE).astype(np.float32)
    fluid, grey, white = _tissues(rng, family)
    mean[list(_FLUID)] = fluid + rng.normal(0, 4, len(_FLUID))
    mean[_EYE] = fluid + rng.normal(0, 10)
    spread = abs(white - grey) * rules.jitter + 1.5
    if family != "random" or rng.random() >= rules.independent:
        tilt = rng.normal(1, 0.15) if family == "t1" else rng.normal(1, 0.35)  # how strongly iron and myelin show in the deep nuclei
        for code, share in _BETWEEN.items():
            deep = share * tilt if 0.05 < share < 0.9 else share
            mean[code] = grey + deep * (white - grey) + rng.normal(0, spread)
    else:
        family = "independent"
    other = mean.copy()
    _outside(mean, other, rng, family)
    low, high = rules.deviation
    deviation = (rng.uniform(low, high) * rng.uniform(0.5, 1.5, TABLE)).astype(np.float32)
    deviation[FIRST_OUTSIDE:] *= np.float32(rng.uniform(1, 2.5))
    noisy = rng.random() < 0.5
    mean[0] = other[0] = rng.uniform(0, 20) if noisy and rng.random() < 0.3 else 0
    deviation[0] = rng.uniform(0, 5) if noisy else 0
    for table in (mean, other, deviation):
        table[list(_LEFT)] = table[list(_LEFT.values())]
    return Contrast(np.clip(mean, 0, TOP), deviation, np.clip(other, 0, TOP), float(np.exp(rng.normal(0, rules.gamma))), family)


def synthesise(
    codes: Array,
    rng: np.random.Generator,
    rules: SynthesisRules,
    *,
    contrast: Contrast | None = None,
    keep: Array | None = None,
    spread: PointSpread | None = None,
) -> Array:
    """An image of a label map.

    Args:
        codes: x y z whole numbers below 1024, FreeSurfer's and SynthSeg's; 0 is air.
        rng: draws; the same generator state and codes give the same image.
        rules: the generator's numbers.
        contrast: drawn before, e.g. to normalise by it; else it is drawn here.
        keep: x y z Boolean, what a skull stripping has left: all else is exactly 0, with a sharp edge.
        spread: from `draw_point_spread`; else it is drawn here.

    Returns:
        x y z float32, 0 to about 255.
    """
    contrast = contrast or draw_contrast(rng, rules)
    shape = _shape(codes)
    texture = smooth_field(rng, shape, 12) + np.float32(rng.normal(0, 0.5)) if (codes >= FIRST_OUTSIDE).any() else None
    image = contrast.draw(codes, rng, texture=texture)
    bias = np.float32(rng.uniform(0, rules.bias))
    image *= np.exp(bias * smooth_field(rng, shape, 2) * np.float32(0.5))
    image = along_axes(image, draw_point_spread(rng, shape, rules) if spread is None else spread)
    image = contrast.correct(image)
    noise = np.float32(rng.uniform(0, rules.noise))
    if rng.random() < 0.5:
        image += noise * rng.standard_normal(shape, np.float32)
        np.abs(image, out=image)
    if not contrast.noisy_air:
        image[codes == 0] = 0
    if keep is not None:
        image *= keep
    return image


def strip_skull(codes: Array, rng: np.random.Generator, *, least_share: float = 0.1) -> Array:
    """The codes without what lies outside of the brain, more or less cleanly.

    Where less than `least_share` is brain, the same array comes back. The fluid around the brain stays, stays as a rim, or
    goes; in one of five draws a shell of other tissue is left over.
    """
    brain = (codes > 0) & (codes < FIRST_OUTSIDE) & (codes != OUTER_FLUID)
    if brain.mean() < least_share:
        return codes
    kind = rng.random()
    if kind < 0.35:
        keep = (codes > 0) & (codes < FIRST_OUTSIDE)
        if rng.random() < 0.4:  # the mask is smooth, and does not follow every sulcus to the bone
            keep &= dilated(brain, 2)
    elif kind < 0.55:
        keep = dilated(brain, int(rng.integers(2, 5)))
    else:
        keep = dilated(brain, 1) & (codes < FIRST_OUTSIDE) if rng.random() < 0.5 else brain
    cord = codes == _CORD
    if cord.any():  # the mask ends below the brainstem, and so does the fluid
        keep &= brain | ~dilated(cord, 8)
    return np.where(keep, codes, 0).astype(codes.dtype)


def strip_raggedly(codes: Array, rng: np.random.Generator, *, voxel_mm: float, least_share: float = 0.1) -> Array:
    """The codes inside a smooth mask around the brain, as a first pass on a coarse grid finds it: wrong by some millimetres, both ways.

    Args:
        codes: x y z.
        rng: draws.
        voxel_mm: edge of a voxel.
        least_share: where less than this is brain, the same array comes back.
    """
    brain = (codes > 0) & (codes < FIRST_OUTSIDE) & (codes != OUTER_FLUID)
    if brain.mean() < least_share:
        return codes
    sigma = rng.uniform(1.0, 4.0) / voxel_mm
    soft = along_axes(brain.astype(np.float32), [blur_matrix(n, sigma) for n in codes.shape])
    wobble = np.float32(rng.uniform(0, 0.15)) * smooth_field(rng, _shape(codes), int(rng.integers(2, 7)))
    keep = soft + wobble > np.float32(rng.uniform(0.05, 0.45))
    return np.where(keep, codes, 0).astype(codes.dtype)


def _tissues(rng: np.random.Generator, family: str) -> tuple[float, float, float]:
    """Means of fluid, grey and white matter."""
    if family == "t1":
        white = rng.uniform(140, 220)
        fluid, grey = rng.uniform(0.08, 0.5), rng.uniform(0.58, 0.86)  # fluid in narrow sulci is never quite dark
        return white * min(fluid, grey - 0.15), white * grey, white
    if family == "t2":
        fluid = rng.uniform(170, 250)
        grey = fluid * rng.uniform(0.45, 0.7)
        return fluid, grey, grey * rng.uniform(0.6, 0.9)
    if family == "flair":
        grey = rng.uniform(110, 180)
        return grey * rng.uniform(0.05, 0.4), grey, grey * rng.uniform(0.7, 0.95)
    fluid, grey, white = rng.uniform(5, 245, 3)
    return fluid, grey, white


def _outside(mean: Array, other: Array, rng: np.random.Generator, family: str) -> None:
    """Means outside of the brain; soft tissue and skin have two kinds under one code, which `other` holds."""
    if family not in {"random", "independent"}:
        fat = rng.uniform(60, 255) if rng.random() < 0.7 else rng.uniform(5, 60)  # fat may be suppressed
        mean[_SKIN], mean[_MARROW], mean[_BONE] = fat * rng.uniform(0.6, 1.1), fat * rng.uniform(0.5, 1.0), rng.uniform(0, 45)
        mean[_SOFT], other[_SOFT] = rng.uniform(40, 140), fat * rng.uniform(0.5, 1.0)
        mean[_VEIN], mean[_ARTERY] = rng.uniform(5, 160, 2)
        other[_SKIN], other[_MARROW], other[_BONE] = mean[_SKIN] * rng.uniform(0.5, 1.0), mean[_MARROW], mean[_BONE]
        other[_VEIN], other[_ARTERY] = mean[_VEIN], mean[_ARTERY]
        return
    for code in (_SOFT, _SKIN, _BONE, _MARROW):
        if rng.random() < 0.5:
            other[code] = rng.uniform(0, TOP)


def draw_point_spread(rng: np.random.Generator, shape: Shape, rules: SynthesisRules) -> PointSpread:
    """A matrix an axis: point spread and, now and then, thick slices."""
    sigma = np.full(3, rng.uniform(*rules.blur_voxels))
    step = np.ones(3)
    if rng.random() < rules.thick_slices:
        axis = int(rng.integers(3))
        step[axis] = rng.uniform(1.2, rules.slice_voxels)
        sigma[axis] = max(sigma[axis], 0.4 * step[axis])
    return [blur_matrix(n, s, t, rng.random()) for n, s, t in zip(shape, sigma, step, strict=True)]


def majority_of_tissues(codes: Array, spread: PointSpread) -> Array:
    """Codes as the scanner could distinguish them: each voxel of a tissue goes to the tissue that most of its signal comes from.

    Only fluid around the brain, cortex and white matter of cerebrum and cerebellum are sorted anew (a sulcus of one voxel is lost in a
    blurred image, and so in its labels); all other codes stay. A voxel is right or left as most of the signal of its new tissue is.
    """
    folded = codes.copy()
    for right, left in _SORTED_SIDES:
        folded[codes == right] = left
    present = [code for code in _SORTED if (folded == code).any()]
    if len(present) < 2:
        return codes
    shares = np.stack([along_axes((folded == code).astype(np.float32), spread) for code in present])
    best = np.asarray(present, codes.dtype)[shares.argmax(0)]
    for right, left in _SORTED_SIDES:
        if not (there := codes == right).any():
            continue
        if not (codes == left).any():
            best[best == left] = right
        else:
            of_right, of_left = (along_axes(side.astype(np.float32), spread) for side in (there, codes == left))
            best[(best == left) & (of_right > of_left)] = right
    return np.where(np.isin(folded, present), best, codes)


def dilated(mask: Array, voxels: int) -> Array:
    """Grown by about `voxels` in every direction: by the six neighbours and by all twenty-six in turn, nearly a ball."""
    found = torch.from_numpy(mask.astype(np.float32))[None, None]
    for step in range(voxels):
        if step % 2 == 0:
            sides = [F.max_pool3d(found, kernel, stride=1, padding=pad) for kernel, pad in _SIDES]
            found = torch.maximum(torch.maximum(sides[0], sides[1]), sides[2])
        else:
            for kernel, pad in _SIDES:  # three lines make a cube
                found = F.max_pool3d(found, kernel, stride=1, padding=pad)
    return np.asarray(found[0, 0].numpy() > 0)


def _shape(array: Array) -> Shape:
    x, y, z = array.shape
    return x, y, z
