"""A head for labels of the trunk, a trunk for labels of the brain, and another modality are told; what is right passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import read_volume
from medlore.segmenting.body_part import oddities


def body_ct(width: float, length: float, *, skull: float, mm: float = 4.0) -> Volume:
    """An elliptic body of soft tissue with a shell of bone, in air; axes R A S."""
    shape = (110, 90, 40)
    x, y = np.meshgrid((np.arange(110) - 55) * mm, (np.arange(90) - 45) * mm, indexing="ij")
    radius = np.sqrt((x / (width / 2)) ** 2 + (y / (length / 2)) ** 2)
    plane = np.where(radius < 1, 40, -1000)
    plane = np.where((radius < 1) & (radius > 1 - skull), 900, plane)
    image = np.repeat(plane[:, :, None], 40, axis=2).astype(np.int16)
    return Volume(image, np.diag([mm, mm, mm, 1.0]), None, shape, Path("ct.nii.gz"))


def test_a_head_ct_is_no_abdomen_and_an_abdomen_no_head() -> None:
    head, trunk = body_ct(150, 190, skull=0.1), body_ct(350, 240, skull=0.0)
    assert "looks like a head" in oddities(head, "ct", ["abdomen"])[0]
    assert oddities(head, "ct", ["brain"]) == []
    assert oddities(head, "ct", ["spine"]) == []
    assert oddities(head, "ct", ["abdomen", "spine"]) == []  # what else was asked may be there
    assert "this is no head" in oddities(trunk, "ct", ["brain"])[0]
    assert oddities(trunk, "ct", ["abdomen", "thorax"]) == []


def test_a_childs_trunk_passes() -> None:
    assert oddities(body_ct(200, 150, skull=0.02), "ct", ["abdomen"]) == []
    assert oddities(body_ct(160, 190, skull=0.0), "ct", ["abdomen"]) == []  # of a head's size, without a skull


def test_another_modality_is_told() -> None:
    trunk = body_ct(350, 240, skull=0.0)
    assert "of a CT" in oddities(trunk, "mri", ["abdomen"])[0]
    bright = Volume((trunk.array + 1000).clip(0, 255).astype(np.uint8), trunk.affine, None, trunk.shape, trunk.path)
    assert "no CT in Hounsfield units" in oddities(bright, "ct", ["abdomen"])[0]
    assert oddities(bright, "mri", ["abdomen"]) == []


@pytest.mark.parametrize(
    ("file", "modality", "region"),
    [
        ("totalseg/example_ct.nii.gz", "ct", "abdomen"),
        ("totalseg/example_ct_sm.nii.gz", "ct", "spine"),
        ("totalseg/example_mr_sm.nii.gz", "mri", "abdomen"),
        ("spm/T1.nii.gz", "mri", "brain"),
        ("spm/PET.nii.gz", "pet", "brain"),
        ("brats/pat0006/Flair_subtrMeanDivStd.nii.gz", "mri", "brain"),
        ("hippocampus/images/hippocampus_003.nii.gz", "mri", "brain"),
        ("acdc/patient002_ed.nii.gz", "mri", "thorax"),
        ("sct/t2s_t2s_uncropped.nii.gz", "mri", "spine"),
    ],
)
def test_real_volumes_that_are_right_pass(shared_data: Path, file: str, modality: str, region: str) -> None:
    assert oddities(read_volume(shared_data / file), modality, [region]) == []


@pytest.mark.parametrize(
    ("file", "modality", "region", "says"),
    [
        ("totalseg/example_ct.nii.gz", "ct", "brain", "no head"),
        ("totalseg/example_mr_sm.nii.gz", "mri", "brain", "no head"),
        ("acdc/patient002_ed.nii.gz", "mri", "brain", "no head"),
        ("spm/T1.nii.gz", "mri", "abdomen", "looks like a head"),
        ("totalseg/example_ct.nii.gz", "mri", "abdomen", "of a CT"),
        ("spm/T1.nii.gz", "ct", "brain", "no CT"),
    ],
)
def test_real_volumes_that_are_wrong_are_told(shared_data: Path, file: str, modality: str, region: str, says: str) -> None:
    assert says in " ".join(oddities(read_volume(shared_data / file), modality, [region]))
