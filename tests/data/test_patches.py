"""Training patches: image and masks move together, prompts are only ever asked where the answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medlore.data.volumes.augmentation import GreyRules, WarpRules
from medlore.data.volumes.cases import Case
from medlore.data.volumes.patches import Patch, PatchRules, draw_patch, other_side
from medlore.data.volumes.synthesis import SynthesisRules
from medlore.data.volumes.training_cache import CachedCase, build_cache
from medlore.decomposing.segmenters.batches import make_rules
from medlore.errors import InputError

SIZE = (24, 24, 24)
STILL = GreyRules(0, 0, (1, 1), 0, 0, 0, 0, 0, 0, 0, 1, 0, 0)
PLAIN = PatchRules(augment=False)
LABELS = ("ball", "rod", "shell", "liver", "kidney")


def ball_codes(shape: tuple[int, int, int] = (40, 44, 36)) -> np.ndarray[Any, Any]:
    """1: a ball off the middle, 2: a rod in a corner, 3: a shell around the ball."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    distance = np.linalg.norm(at - np.array([16, 24, 15]).reshape(3, 1, 1, 1), axis=0)
    codes = np.select([distance < 8, distance < 11], [1, 3], 0)
    codes[-4:-1, -4:-1, 2:-2] = 2
    return codes.astype(np.uint8)


def cached(folder: Path, codes: np.ndarray[Any, Any], name: str = "scene", **other: Any) -> CachedCase:
    """A case whose grey values are its codes (times 300)."""
    image = codes.astype(np.int16) * 300 + 1
    image[0, 0, 0] = 0
    for kind, array in (("image", image), ("mask", codes)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}_{kind}.nii.gz")
    values = {"ball": [1], "rod": [2], "shell": [3]}
    labels = other.pop("labels", tuple(values))
    mask = folder / f"{name}_mask.nii.gz"
    picture = mask if other.get("synthesise") else folder / f"{name}_image.nii.gz"
    case = Case(picture, labels, "mri", mask=mask, other={"mask_values": values, **other})
    return build_cache([case], folder / "cache", {"spacing_mm": [1, 1, 1]}).cases[0]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> CachedCase:
    return cached(tmp_path_factory.mktemp("scene"), ball_codes())


def draw(case: CachedCase, seed: int, rules: PatchRules = PLAIN, labels: tuple[str, ...] = LABELS, **more: Any) -> Patch:
    return draw_patch(case, **{"size": SIZE, "labels": labels, "max_prompts": 8, "seed_words": (5, seed), "rules": rules, **more})


def test_a_patch_is_a_function_of_its_seed_words(scene: CachedCase) -> None:
    one, two, other = (draw(scene, seed, PatchRules()) for seed in (1, 1, 2))
    assert np.array_equal(one.image, two.image)
    assert np.array_equal(one.targets, two.targets)
    assert one.labels == two.labels
    assert not np.array_equal(one.image, other.image)


def test_image_and_masks_move_together(scene: CachedCase) -> None:
    rules = PatchRules(grey=STILL, warp=WarpRules(probability=1, rotation_degrees=25, elastic_voxels=3))
    grey = {label: np.median(scene.image[scene.codes == code]) for code, label in ((1, "ball"), (3, "shell"))}  # type: ignore[index]
    seen = 0
    for seed in range(12):
        patch = draw(scene, seed, rules)
        if "ball" in patch.labels[: patch.positives]:
            mask = patch.targets[patch.labels.index("ball")].numpy()
            drawn = patch.image[0].numpy()[mask]
            assert np.mean(np.abs(drawn - grey["ball"]) < 0.3) > 0.75 or mask.sum() < 200  # interpolated at the rim
            seen += mask.sum() > 500
    assert seen > 4


def test_without_augmentation_a_patch_is_cut_from_inside_the_volume(scene: CachedCase) -> None:
    assert scene.image is not None
    grey = {label: scene.image[scene.codes == code][0] for code, label in ((1, "ball"), (2, "rod"), (3, "shell"))}
    for seed in range(10):
        patch = draw(scene, seed)
        drawn = patch.image[0].numpy()
        for label, target in zip(patch.labels, patch.targets.numpy(), strict=True):
            assert (drawn[target] == grey[label]).all() if label in grey else not target.any()
    assert np.array_equal(draw(scene, 0, size=scene.shape).image[0], scene.image)  # the only place that lies wholly inside


def test_a_small_volume_lies_anywhere_in_its_patch_with_air_around(tmp_path: Path) -> None:
    case = cached(tmp_path, ball_codes()[8:26, 14:34, 6:24])
    starts = set()
    for seed in range(8):
        patch = draw(case, seed, size=(32, 32, 32))
        inside = np.argwhere(patch.targets[: patch.positives].any(0).numpy())
        starts.add(tuple(inside.min(0)))
        outside = patch.image[0].numpy().copy()
        assert (outside == np.float16(case.air)).mean() > 0.5
        mask = patch.targets[patch.labels.index("ball")]
        assert int(mask.sum()) == case.voxels["ball"]
    assert len(starts) > 4


def test_centres_follow_labels(scene: CachedCase) -> None:
    def share(rules: PatchRules) -> float:
        drawn = [draw(scene, seed, rules, size=(10, 10, 10)) for seed in range(60)]
        return float(np.mean(["rod" in patch.labels[: patch.positives] for patch in drawn]))

    by_label = share(PatchRules(augment=False, foreground=0, by_label=1, jitter=0))
    by_voxel = share(PatchRules(augment=False, foreground=1, by_label=0, jitter=0))
    anywhere = share(PatchRules(augment=False, foreground=0, by_label=0))
    assert 0.2 < by_label < 0.5  # one label of three, small as it is
    assert by_voxel < by_label  # voxel by voxel the rod is rare
    assert anywhere < by_label


def test_only_known_labels_are_asked_for(tmp_path: Path) -> None:
    case = cached(tmp_path, ball_codes(), absent=["liver"])
    asked = set()
    for seed in range(40):
        patch = draw(case, seed, size=(12, 12, 12))
        asked |= set(patch.labels)
        for label, target in zip(patch.labels, patch.targets, strict=True):
            assert bool(target.any()) == (label in patch.labels[: patch.positives])
    assert asked == {"ball", "rod", "shell", "liver"}  # the kidney is not annotated, so nobody knows


def test_prompts_are_at_most_as_many_as_wanted_and_keep_one_negative(tmp_path: Path) -> None:
    case = cached(tmp_path, ball_codes(), absent=["liver", "kidney"])
    for seed in range(10):
        patch = draw(case, seed, max_prompts=2, size=(40, 40, 36))
        assert len(patch.labels) == len(patch.targets) == 2
        assert patch.positives == 1
    assert len(draw(case, 0, max_prompts=1, size=(40, 40, 36)).labels) == 1


def test_a_case_that_knows_none_of_the_labels_is_refused(scene: CachedCase) -> None:
    with pytest.raises(InputError, match="none of the 2 label"):
        draw(scene, 0, labels=("liver", "kidney"))


def test_labels_with_a_side_forbid_mirror_images(tmp_path: Path) -> None:
    codes = np.zeros((30, 30, 30), np.uint8)
    codes[4:10, 10:20, 10:20] = 1
    codes[20:26, 10:20, 10:20] = 2
    rules = PatchRules(grey=STILL, warp=WarpRules(probability=0, flip=1))
    mirrored = {}
    for name, labels in (("sided", ("left ball", "rod")), ("plain", ("ball", "rod"))):
        case = cached(tmp_path, codes, name, labels=labels, mask_values={labels[0]: [1], "rod": [2]})
        patch = draw(case, 0, rules, labels=labels, size=(30, 30, 30))
        ball, rod = (np.argwhere(patch.targets[patch.labels.index(label)].numpy())[:, 0].mean() for label in labels)
        mirrored[name] = bool(ball > rod)
    assert mirrored == {"sided": False, "plain": True}


def test_sides_are_swapped_with_the_image_where_each_has_its_partner(tmp_path: Path) -> None:
    """The grey value tells which structure it was, the place which side it is on now: in a mirror image the names follow the place."""
    codes = np.zeros((30, 30, 30), np.uint8)
    codes[2:10, 10:20, 10:20] = 1  # x grows to the right: this one is left
    codes[22:26, 10:20, 10:20] = 2
    codes[14:16, 4:8, 4:8] = 3
    values = {"left ball": [1], "right ball": [2], "vermis": [3]}
    case = cached(tmp_path, codes, labels=tuple(values), mask_values=values)
    volumes = {}
    for flip in (0, 1):
        rules = PatchRules(grey=STILL, warp=WarpRules(probability=0, flip=flip))
        patch = draw(case, 0, rules, labels=tuple(values), size=(30, 30, 30))
        masks = {label: patch.targets[patch.labels.index(label)].numpy() for label in values}
        assert np.argwhere(masks["left ball"])[:, 0].max() < np.argwhere(masks["right ball"])[:, 0].min()
        image = patch.image[0].numpy()
        darker, brighter = (image[masks[f"{side} ball"]].mean() for side in (("left", "right") if flip == 0 else ("right", "left")))
        assert darker < brighter  # code 1 is darker than code 2, whatever it is called now
        volumes[flip] = [int(masks[f"{side} ball"].sum()) for side in ("left", "right")]
    assert volumes[0] == [800, 400]
    assert volumes[1] == [400, 800]


def test_the_other_side_of_a_name() -> None:
    assert other_side("left hippocampus") == "right hippocampus"
    assert other_side("hippocampus (right)") == "hippocampus (left)"
    assert other_side("leftover") == "leftover"


def head_codes() -> np.ndarray[Any, Any]:
    at = np.stack(np.meshgrid(*[np.arange(48) - 23.5] * 3, indexing="ij"))
    radius = np.linalg.norm(at, axis=0)
    return np.select([radius < 11, radius < 15, radius < 17, radius < 19, radius < 21], [2, 3, 24, 515, 507], 0).astype(np.uint16)


def test_heads_are_drawn_with_exact_labels_and_normalised_greys(tmp_path: Path) -> None:
    values = {"white matter": [2], "grey matter": [3], "cerebrospinal fluid": [24]}
    case = cached(tmp_path, head_codes(), synthesise=True, labels=tuple(values), mask_values=values)
    means, deviations, contrasts = [], [], []
    rules = PatchRules(synthesis=SynthesisRules(thick_slices=0), warp=WarpRules(probability=0))
    for seed in range(16):
        patch = draw(case, seed, rules, labels=tuple(values), size=(44, 44, 44))
        image = patch.image[0].numpy()
        assert np.isfinite(image).all()
        means.append(image.mean())
        deviations.append(image.std())
        grey, white = (image[patch.targets[patch.labels.index(name)].numpy()] for name in ("grey matter", "white matter"))
        contrasts.append(abs(np.median(grey) - np.median(white)) / (grey.std() + white.std()))
    assert np.abs(np.mean(means)) < 0.5  # about 0 and 1, as over the whole volume at segment time
    assert 0.6 < np.mean(deviations) < 1.4
    assert np.median(contrasts) > 0.5


def test_what_is_stripped_from_the_image_is_stripped_from_the_masks(tmp_path: Path) -> None:
    values = {"white matter": [2], "cerebrospinal fluid": [24]}
    case = cached(tmp_path, head_codes(), synthesise=True, labels=tuple(values), mask_values=values)
    rules = PatchRules(synthesis=SynthesisRules(skull_strip=1), warp=WarpRules(probability=0), grey=STILL)
    whole = 0
    for seed in range(16):
        patch = draw(case, seed, rules, labels=tuple(values), size=(44, 44, 44))
        fluid = patch.labels.index("cerebrospinal fluid") if "cerebrospinal fluid" in patch.labels else None
        count = 0 if fluid is None else int(patch.targets[fluid].sum())
        whole += count == case.voxels["cerebrospinal fluid"]
        image = patch.image[0].numpy()
        seen = image > image[0, 0, 0]  # the corner is air
        assert (seen[patch.targets.any(0).numpy()]).mean() > 0.5
        assert seen.mean() < 0.5
    assert 0 < whole < 16  # sometimes the fluid stays, sometimes it goes, in image and mask alike


def test_labels_can_weigh_more_in_the_loss(scene: CachedCase) -> None:
    rules = make_rules({"augment": False, "weights": {"ball": 3.0}}, {}, {})
    patches = [draw(scene, seed, rules) for seed in range(6)]
    for patch in patches:
        assert patch.weight is not None
        assert patch.weight.tolist() == [3.0 if label == "ball" else 1.0 for label in patch.labels]
    assert {"ball", "rod"} <= {label for patch in patches for label in patch.labels}
    assert draw(scene, 1).weight is None


def whole_head(folder: Path) -> CachedCase:
    """The head of `head_codes` at 5 mm, with a neck of soft tissue down to the lowest plane, so that one patch shows all of it."""
    codes = head_codes()
    codes[20:28, 20:28, :8] = 507
    nib.save(nib.Nifti1Image(codes, np.diag([5.0, 5.0, 5.0, 1.0])), folder / "head.nii.gz")
    other = {"mask_values": {"white matter": [2], "grey matter": [3]}, "synthesise": True}
    case = Case(folder / "head.nii.gz", ("white matter", "grey matter"), "mri", mask=folder / "head.nii.gz", other=other)
    return build_cache([case], folder / "cache", {"spacing_mm": [5, 5, 5]}).cases[0]


def test_a_patch_that_shows_a_whole_head_is_normalised_by_itself(tmp_path: Path) -> None:
    case = whole_head(tmp_path)
    for seed in range(6):
        rules = PatchRules(warp=WarpRules(probability=0), grey=STILL, synthesis=SynthesisRules(skull_strip=0))
        image = draw(case, seed, rules, labels=("white matter",), size=(64, 64, 64)).image[0].numpy()
        box = tuple(slice(int(a.min()), int(a.max()) + 1) for a in np.nonzero(image > image.min()))
        assert image[box].mean() == pytest.approx(0, abs=1e-3)
        assert image[box].std() == pytest.approx(1, abs=1e-3)


def test_a_longer_neck_fills_what_lies_below_the_map(tmp_path: Path) -> None:
    case = whole_head(tmp_path)
    filled = {}
    for chance in (0.0, 1.0):
        synthesis = SynthesisRules(skull_strip=0, longer_neck=chance, t1_like=1, t2_like=0, flair_like=0, noise=0)
        rules = PatchRules(
            warp=WarpRules(probability=1, rotation_degrees=0, scale=(1, 1), elastic_voxels=0), grey=STILL, synthesis=synthesis
        )
        images = [draw(case, seed, rules, labels=("white matter",), size=(64, 64, 64)).image[0].numpy() for seed in range(8)]
        filled[chance] = np.mean([(image[:, :, :4] > image.min() + 0.2).mean() for image in images])
    assert filled[0.0] < 0.05
    assert filled[1.0] > filled[0.0] + 0.02
