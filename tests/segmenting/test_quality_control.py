"""The picture of a case: outlines where the masks are, every label named, doubts in another colour."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import medlore
from medlore.pages.colours import label_colour
from medlore.segmenting.quality_control import write_quality_control
from medlore.segmenting.segmentation import Segmentation
from medlore.segmenting.verdict import Flag
from small_segmenter import write_small_pack

DOUBT = (255, 157, 92)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Segmentation:
    folder = tmp_path_factory.mktemp("picture")
    array = np.full((40, 48, 30), -1000, np.int16)
    array[4:-4, 5:-5, 2:-2] = np.random.default_rng(0).normal(50, 60, (32, 38, 26))
    nib.save(nib.Nifti1Image(array, np.diag([-0.9, -0.9, 2.5, 1])), folder / "ct.nii.gz")
    segmenter = medlore.load_segmenter(write_small_pack(folder / "pack", roi_size=(32, 32, 16)), device="cpu", precision="fp32")
    return segmenter.segment(folder / "ct.nii.gz", ["liver", "spleen"], modality="ct").segmentation


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(picture.astype(int) - colour).max(axis=-1) < 12).nonzero()


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_every_label_has_its_outline_and_its_line_in_the_legend(result: Segmentation, tmp_path: Path) -> None:
    assert all(result.voxels(label) for label in result.routes.labels)
    picture = drawn(write_quality_control(tmp_path / "q.png", result, "case"))
    assert picture.shape[1] == 1430
    for index in range(2):
        rows, columns = near(picture, label_colour(index))
        assert (rows > picture.shape[0] - 40).sum() > 60, "the line before the name"
        assert {int(column * 3 / 1430) for column in columns[rows < picture.shape[0] - 60]} == {0, 1, 2}, "all three planes"


def test_what_the_check_flags_is_said_in_another_colour(result: Segmentation, tmp_path: Path) -> None:
    assert result.verdict is not None
    plain = drawn(write_quality_control(tmp_path / "a.png", replace(result, verdict=replace(result.verdict, flags=(), image=())), "case"))
    assert not len(near(plain, DOUBT)[0])
    flags = (Flag("spleen", "volume", "900 ml"),)
    doubted = drawn(write_quality_control(tmp_path / "b.png", replace(result, verdict=replace(result.verdict, flags=flags)), "case"))
    rows, _ = near(doubted, DOUBT)
    assert (rows < 60).any()
    assert (rows > doubted.shape[0] - 40).any()
    assert doubted.shape[0] == plain.shape[0] + 20, "one more line of text"
