"""The verdict: every check speaks up for what it is for, stays silent else, and says why where it cannot judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from medlore.assets import asset_path
from medlore.data.volumes.geometry import Array
from medlore.files import read_json
from medlore.models.segmenter.manifest import CHECK_LIMITS, preprocessing_faults
from medlore.segmenting.checks import CHECKS
from medlore.segmenting.evidence import boxed
from medlore.segmenting.expectations import LIMITS, expectations_of
from medlore.segmenting.midplane import midplane_of_mask
from medlore.segmenting.scene import Scene, Structure
from medlore.segmenting.verdict import Verdict, judge

SHAPE = (90, 100, 80)
MM = 2.0
PACK: dict[str, Any] = {
    "inside": "brain",
    "least_mm": 110,
    "structures": {
        "brain": {"ml": [850, 1750], "pieces": 1},
        "cerebellum": {"ml": [90, 180], "pieces": 1},
        "thalamus": {"ml": [8, 22], "pieces": 2, "paired": True},
    },
}


def ball(centre: tuple[float, float, float], radius: float, shape: tuple[int, ...] = SHAPE) -> Array:
    """A ball, in voxels."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    return np.asarray(np.linalg.norm(at - np.array(centre).reshape(3, 1, 1, 1), axis=0) < radius)


BRAIN = ball((45, 50, 40), 33)  # 1.2 l at 2 mm
CEREBELLUM = ball((45, 35, 25), 15)  # 113 ml
RIGHT, LEFT = ball((53, 50, 40), 5.5), ball((37, 50, 40), 5.5)  # 5.6 ml each


def scene(brain: Array | None = BRAIN, pack: Mapping[str, Any] | None = None, mm: float = MM, shape: tuple[int, int, int] = SHAPE) -> Scene:
    expected = expectations_of({"checks": {"mri": PACK if pack is None else pack}}, "mri")
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = [-mm * n / 2 for n in shape]
    return Scene(shape, affine, ((True, True),) * 3, expected, None if brain is None else boxed(brain))


def told(label: str, mask: Array, around: Scene, **more: Any) -> Verdict:
    return judge([Structure(label, boxed(mask), around, around.expected.structures.get(label), **more)], level="quick")


def test_what_is_plausible_has_no_flags() -> None:
    around = scene()
    structures = {"brain": BRAIN, "cerebellum": CEREBELLUM, "thalamus": RIGHT | LEFT}
    seen = [Structure(label, boxed(mask), around, around.expected.structures[label]) for label, mask in structures.items()]
    verdict = judge(seen, level="quick")
    assert verdict.lines() == []
    assert not verdict.flagged
    assert verdict.not_judged == {}
    assert verdict.measured["cerebellum"]["volume_ml"] == pytest.approx(CEREBELLUM.sum() * 0.008, abs=1e-3)
    assert verdict.measured["thalamus"]["smaller_side"] > 0.9


def test_a_cerebellum_over_the_frontal_lobes_is_told_with_its_millilitres() -> None:
    far = ball((45, 68, 50), 14.5)
    mask = CEREBELLUM | far
    ml, away = mask.sum() * 0.008, far.sum() * 0.008
    assert told("cerebellum", mask, scene()).lines() == [f"check: cerebellum {ml:.0f} ml, expected 90 to 180; {away:.0f} ml apart"]


def test_what_lies_on_the_edge_of_the_image_is_cut_and_not_too_small() -> None:
    cut = scene(BRAIN[:, :, 30:], shape=(90, 100, 60), pack={**PACK, "least_mm": 0})
    rest = CEREBELLUM[:, :, 30:]
    line = told("cerebellum", rest, cut).lines()
    assert len(line) == 1
    assert "cut by the edge of the image" in line[0]
    assert "expected" not in line[0]
    small = ball((45, 35, 25), 8)
    assert "expected 90 to 180" in told("cerebellum", small, scene()).lines()[0]
    gone = told("cerebellum", np.zeros((90, 100, 60), bool), cut).lines()
    assert gone == ["check: cerebellum not found, expected 90 to 180 ml; the brain is cut by the edge of the image"]


def test_a_crop_is_not_judged_for_what_may_lie_outside_but_for_what_is_too_large() -> None:
    crop = scene(mm=0.9)  # 72 mm high
    verdict = told("thalamus", RIGHT, crop)
    assert verdict.lines() == []
    assert set(verdict.not_judged) == {"volume", "sides"}
    assert told("thalamus", BRAIN, scene(mm=0.9)).lines()


def test_sides_are_told_at_the_mid_plane_of_the_brain_however_the_head_is_stored_or_turned() -> None:
    uneven = RIGHT | ball((37, 50, 40), 3.5)
    for axes, flips in (((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (1, -1, 1)), ((1, 2, 0), (-1, 1, -1))):
        flipped = tuple(slice(None, None, f) for f in flips)
        brain, mask = (array.transpose(axes)[flipped] for array in (BRAIN, uneven))
        around = scene()
        step = np.zeros((4, 4))
        step[3, 3] = 1
        for new, (old, f) in enumerate(zip(axes, flips, strict=True)):
            step[old, new], step[old, 3] = f, SHAPE[old] - 1 if f < 0 else 0
        turned = Scene(brain.shape, around.affine @ step, around.edges, around.expected, boxed(brain))
        verdict = told("thalamus", mask, turned)
        right, left = verdict.measured["thalamus"]["side_ml"]
        assert right == pytest.approx(RIGHT.sum() * 0.008, rel=0.05)
        assert left == pytest.approx(ball((37, 50, 40), 3.5).sum() * 0.008, rel=0.05)
        assert [flag.check for flag in verdict.flags] == ["sides"] or {flag.check for flag in verdict.flags} == {"volume", "sides"}


@pytest.mark.parametrize("degrees", [-12.0, 0.0, 8.0])
def test_the_mid_plane_follows_a_turned_head(degrees: float) -> None:
    at = np.stack(np.meshgrid(*[np.arange(n) - n // 2 for n in SHAPE], indexing="ij")).reshape(3, -1).astype(float)
    turn = np.radians(degrees)
    x, y = np.cos(turn) * at[0] - np.sin(turn) * at[1], np.sin(turn) * at[0] + np.cos(turn) * at[1]
    brain = ((x / 30) ** 2 + (y / 42) ** 2 + (at[2] / 28) ** 2 < 1) & ~((np.abs(x) < 2) & (y > 25))
    box = boxed(brain.reshape(SHAPE))
    assert box is not None
    plane = midplane_of_mask(*box, scene().affine)
    expected = np.array([np.cos(turn), -np.sin(turn), 0.0])
    assert np.degrees(np.arccos(min(abs(float(np.dot(plane.normal, expected))), 1.0))) < 4


def test_a_label_without_a_partner_is_not_judged_and_one_with_a_partner_is() -> None:
    alone = told("left hippocampus", LEFT, scene())
    assert alone.not_judged["sides"] == {"its partner on the other side was not asked for": ["left hippocampus"]}
    assert alone.lines() == []
    assert "the other side" in told("left hippocampus", LEFT, scene(), partner=1.0).lines()[0]
    assert told("left hippocampus", LEFT, scene(), partner=5.0).lines() == []


def test_without_ranges_or_a_brain_the_verdict_says_what_it_could_not_judge() -> None:
    verdict = told("thalamus", RIGHT, scene(None, {"structures": {}}))
    assert verdict.lines() == []
    assert verdict.not_judged == {"volume": {"the pack states no range of volumes": ["thalamus"]}}
    blind = told("thalamus", RIGHT | LEFT, scene(None))
    assert set(blind.not_judged) == {"outside", "sides"}


def test_outside_vague_dropped_and_disagreeing_masks_are_told() -> None:
    away = ball((14, 50, 40), 6)  # on the rim of the brain
    pack = {**PACK, "limits": {"border_entropy": 0.9}}
    verdict = told(
        "thalamus",
        RIGHT | away,
        scene(pack=pack),
        dropped_ml=20.0,
        entropy=0.95,
        agreement={"shifted windows": 0.9, "the mirror image": 0.4},
    )
    words = "; ".join(flag.says for flag in verdict.flags)
    assert {flag.check for flag in verdict.flags} >= {"outside", "dropped", "border", "agreement"}
    assert "outside of the brain" in words
    assert "20 ml of stray parts dropped" in words
    assert "Dice 0.40 with the mirror image" in words
    assert "shifted" not in words
    record = verdict.record()
    assert record["flagged"]
    assert record["measured"]["thalamus"]["agreement"] == {"shifted windows": 0.9, "the mirror image": 0.4}


def test_one_table_of_checks_and_one_list_of_limits() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert set(LIMITS) | {"border_entropy"} == set(CHECK_LIMITS)


@pytest.mark.parametrize(
    "change",
    [
        {"structures": {"brain": {"ml": [5, 1]}}},
        {"structures": {"brain": {"ml": [-1, 1]}}},
        {"structures": {"brain": {"pieces": 0}}},
        {"structures": {"brain": {"strange": 1}}},
        {"limits": {"strange": 1}},
        {"limits": {"agreement": -1}},
        {"inside": 3},
        {"sources": [3]},
        {"strange": 1},
    ],
    ids=str,
)
def test_a_pack_that_states_nonsense_is_refused(change: dict[str, Any]) -> None:
    assert preprocessing_faults({"checks": {"mri": PACK}}, "preprocessing") == []
    assert len(preprocessing_faults({"checks": {"mri": {**PACK, **change}}}, "preprocessing")) == 1


def test_the_shipped_pack_states_ranges_with_sources_that_hold_real_heads(shared_data: Any) -> None:
    import nibabel as nib

    told_ = read_json(asset_path("medlore:seg-mini") / "manifest.json")["preprocessing"]
    expected = expectations_of(told_, "mri")
    sources = " ".join(told_["checks"]["mri"]["sources"])
    card = (asset_path("medlore:seg-mini") / "README.md").read_text(encoding="utf-8")
    for name in ("Allen", "Escalona", "Potvin", "Kruggel", "Pedraza"):
        assert name in sources
        assert name in card
    codes = {
        "hippocampus": [17, 53], "amygdala": [18, 54], "thalamus": [10, 49], "caudate nucleus": [11, 50], "putamen": [12, 51],
        "pallidum": [13, 52], "brainstem": [16], "cerebellum": [7, 8, 46, 47], "brain ventricle": [4, 5, 14, 15, 43, 44],
    }  # fmt: skip
    for file in sorted((shared_data / "synthseg").glob("training_seg_*.nii.gz")):
        counts = np.bincount(np.asarray(nib.load(file).dataobj).astype(int).reshape(-1), minlength=600) / 1000
        for label, values in codes.items():
            low, high = expected.structures[label].ml or (0, 0)
            assert low <= counts[values].sum() <= high, (file.name, label)
            if expected.structures[label].paired:
                assert counts[values].min() / counts[values].max() > expected.limits["smaller_side"]
