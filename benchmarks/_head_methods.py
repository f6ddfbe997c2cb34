"""How the ten heads are labelled: our packs, and what costs nothing: k-means, registered atlases, public networks.

A method is a function of a subject; it returns an answer: structure -> mask or None, and what it knows of sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks._head_labels import SIDED, SUBJECTS, UNSIDED, Head, codes_of, read_head
from benchmarks._meshnet import classes_of, conformed, read_meshnet, restored
from medlore.data.volumes.geometry import Array
from medlore.demo.tissue_baseline import kmeans_classes
from medlore.segmenting.segmenter import load_segmenter

Pair = tuple[Array, Array]
_PARTS: dict[str, tuple[str, ...]] = {
    "grey matter": (
        "cerebral cortex", "cerebellar cortex", "thalamus", "caudate nucleus", "putamen", "hippocampus", "amygdala", "nucleus accumbens",
    ),
    "white matter": ("cerebral white matter", "cerebellar white matter", "pallidum", "ventral diencephalon", "brainstem"),
    "cerebellum": ("cerebellar cortex", "cerebellar white matter"),
    "brain ventricle": ("lateral ventricle", "third ventricle", "fourth ventricle"),
}  # fmt: skip
# Class of a MeshNet -> our structure; what begins with `ctx-` is cortex.
_MESHNET_NAMES = {
    "Cerebral-White-Matter": "cerebral white matter", "Cerebral-Cortex": "cerebral cortex", "Lateral-Ventricle": "lateral ventricle",
    "Inferior-Lateral-Ventricle": "lateral ventricle", "Cerebellum-White-Matter": "cerebellar white matter",
    "Cerebellum-Cortex": "cerebellar cortex", "Thalamus": "thalamus", "Caudate": "caudate nucleus", "Putamen": "putamen",
    "Pallidum": "pallidum", "3rd-Ventricle": "third ventricle", "4th-Ventricle": "fourth ventricle", "Brain-Stem": "brainstem",
    "Hippocampus": "hippocampus", "Amygdala": "amygdala", "Accumbens-area": "nucleus accumbens", "VentralDC": "ventral diencephalon",
    "White Matter": "white matter", "Grey Matter": "grey matter", "Ventricle": "brain ventricle", "Cerebellum": "cerebellar cortex",
    "Thalamus-Proper*": "thalamus", "Corpus callosum": "cerebral white matter",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Answers:
    """What a method says of a subject.

    Args:
        masks: structure -> Boolean mask.
        sided: structure -> masks of the right and of the left; empty for a method without sides.
    """

    masks: Mapping[str, Array]
    sided: Mapping[str, Pair] = field(default_factory=dict)

    def __call__(self, structure: str) -> Array | None:
        """The mask of a structure, put together from its parts where there is none of its own."""
        if structure in self.masks:
            return self.masks[structure]
        parts = _PARTS.get(structure, ())
        if not parts or any(part not in self.masks for part in parts):
            return None
        return np.logical_or.reduce([self.masks[part] for part in parts])


Method = Callable[[Head], Answers]


def pack_method(pack: str) -> Method:
    """A pack of a segmenter, asked for all structures of the table that it knows."""
    model = load_segmenter(pack, device="cpu")
    known = model.labels("mri")
    wanted = [*_PARTS, *SIDED, *UNSIDED, "brain"]
    plain = [name for name in dict.fromkeys(wanted) if name in known]
    sides = [(name, f"right {name}", f"left {name}") for name in SIDED if {f"right {name}", f"left {name}"} <= set(known)]

    def run(head: Head) -> Answers:
        found = model.segment(head.volume, [*plain, *(label for _, *pair in sides for label in pair)], modality="mri")
        return Answers({name: found[name] for name in plain}, {name: (found[right], found[left]) for name, right, left in sides})

    return run


def kmeans(head: Head) -> Answers:
    """Three classes of the grey values inside the skull-stripped image: the darkest is fluid, then grey, then white."""
    classes = kmeans_classes(head.volume.array, head.volume.array > 0)
    return Answers({"grey matter": classes == 2, "white matter": classes == 3})


def atlas_method(folder: Path, count: int) -> Method:
    """Leave one out: the next subjects of the list (the last is followed by the first), registered affinely; a vote of their labels."""

    def run(head: Head) -> Answers:
        at = SUBJECTS.index(head.name)
        others = [read_head(folder, SUBJECTS[(at + step) % len(SUBJECTS)]) for step in range(1, count + 1)]
        return answers_of_codes(voted([registered(other, head) for other in others]))

    return run


def registered(atlas: Head, head: Head) -> Array:
    """The manual labels of an atlas on the grid of a subject, moved by the affine map that makes their images alike (SimpleITK).

    From the centres of mass, mutual information of a twentieth of the voxels at 4 mm, then at 2 mm.
    """
    import SimpleITK as sitk  # noqa: N813 - its usual name

    fixed, moving = (_as_image(h.volume.array.astype(np.float32), h) for h in (head, atlas))
    start = sitk.CenteredTransformInitializer(fixed, moving, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.MOMENTS)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.05)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 60, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2, 1])
    method.SetInitialTransform(start, inPlace=False)
    found = method.Execute(fixed, moving)
    labels = sitk.Resample(_as_image(atlas.manual.astype(np.uint8), atlas), fixed, found, sitk.sitkNearestNeighbor, 0)
    return np.asarray(sitk.GetArrayFromImage(labels).transpose(2, 1, 0))


def _as_image(array: Array, head: Head) -> object:
    import SimpleITK as sitk  # noqa: N813 - its usual name

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(head.volume.affine, float)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing([float(v) for v in spacing])
    image.SetOrigin([float(v) for v in lps[:3, 3]])
    image.SetDirection([float(v) for v in (lps[:3, :3] / spacing).reshape(-1)])
    return image


def voted(maps: Sequence[Array]) -> Array:
    """The label that most maps have at a voxel; where all differ, that of the first."""
    best, most = maps[0].copy(), np.ones(maps[0].shape, np.int8)
    for candidate in maps:
        count = np.sum([candidate == other for other in maps], axis=0, dtype=np.int8)
        better = count > most
        best[better], most[better] = candidate[better], count[better]
    return best


def answers_of_codes(codes: Array) -> Answers:
    """Answers of a map with the manual numbers."""
    masks = {name: np.isin(codes, codes_of(name)) for name in (*SIDED, *UNSIDED)}
    masks |= {name: np.isin(codes, codes_of(name)) for name in ("grey matter", "white matter", "brain ventricle")}
    sided = {name: (np.isin(codes, right), np.isin(codes, left)) for name, (right, left) in SIDED.items()}
    return Answers({**masks, "brain": codes > 0}, sided)


def meshnet_method(folder: Path) -> Method:
    """A public MeshNet."""
    layers, names = read_meshnet(folder)

    def run(head: Head) -> Answers:
        labels = restored(classes_of(layers, conformed(head.volume)), head.volume)
        return Answers(dict(masks_of_classes(labels, names)))

    return run


def masks_of_classes(labels: Array, names: Sequence[str]) -> Iterable[tuple[str, Array]]:
    """Structure -> mask of a MeshNet's classes; only a network that finds its parts yields a brain."""
    members: dict[str, list[int]] = {}
    for value, name in enumerate(names):
        structure = "cerebral cortex" if name.startswith("ctx-") else _MESHNET_NAMES.get(name)
        if structure is not None:
            members.setdefault(structure, []).append(value)
    yield from ((structure, np.isin(labels, values)) for structure, values in members.items())
    if len(members) > 2:
        yield "brain", labels > 0
