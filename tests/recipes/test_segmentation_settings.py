"""A segmenter's study with wrong settings is refused with its line before a volume is read or a folder made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from tiny_segmentation import STUDY

from medlore.cli import main
from medlore.errors import InputError, UnknownNameError
from medlore.models.bundle import load_segmenter
from medlore.recipes.segmentation.few_shot import FewShotSettings, plan_tuning
from medlore.recipes.segmentation.study import read_study
from small_segmenter import write_small_pack


def study_with(folder: Path, **changes: Any) -> Path:
    values = yaml.safe_load(STUDY)
    for place, value in changes.items():
        *way, last = place.split("__")
        inner = values
        for name in way:
            inner = inner.setdefault(name, {})
        inner[last] = value
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    return folder / "study.yaml"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student__sizes__features": [4]}, r"line \d+, student\.sizes: 1 features and 1 strides"),
        ({"student__sizes__heads": 3}, r"line \d+, student\.sizes: query_width 16 is no multiple of 3 heads"),
        ({"teacher__sizes__mask_activation": "relu"}, r"line \d+, teacher\.sizes\.mask_activation: .*'gelu' or 'none'"),
        ({"preprocessing__overlp": 0.2}, r"preprocessing has \['overlp'\]; known are orientation"),
        ({"preprocessing__overlap": "x"}, r"preprocessing\.overlap: 'x' is no number from 0 below 1"),
        ({"preprocessing__spacing_mm": [1, 1]}, r"preprocessing\.spacing_mm: \[1, 1\] is no three lengths"),
        ({"preprocessing__roi_size": [10, 10, 10]}, r"preprocessing\.roi_size: \[10, 10, 10\]\. Accepted: multiples of .* 4"),
        ({"regions": {"liver": "brain"}}, r"regions has \['liver'\]; each is modality/label"),
        ({"variants": ["experts", "shared", "shared"]}, r"variants name one twice"),
        ({"teacher__learning_rate": float("inf")}, r"line \d+, teacher\.learning_rate: .*finite number"),
        ({"seed": -1}, r"line \d+, seed: "),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_with(tmp_path, **changes)
    with pytest.raises(InputError, match=said):
        read_study(study)
    assert main(["decompose", str(study), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "To do:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_flags_and_folders_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_with(tmp_path)
    assert main(["decompose", str(study), "--out", str(tmp_path / "out"), "--only", "techer", "--dry-run"]) == 2
    assert "--only: unknown name 'techer'" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main(["decompose", str(study), "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_region_that_is_none_gets_the_nearest(tmp_path: Path) -> None:
    pack = write_small_pack(tmp_path / "pack", roi_size=(24, 24, 24))
    (tmp_path / "cases.jsonl").write_text('{"image": "a.nii.gz", "mask": "m.nii.gz", "label": ["liver"], "modality": "ct"}\n')
    settings = FewShotSettings(model=str(pack), cases=tmp_path / "cases.jsonl", region="brian", patch_size=(8, 8, 8))
    with pytest.raises(UnknownNameError, match=r"--region: unknown name 'brian'.*'brain'"):
        plan_tuning(settings)
    assert load_segmenter(pack).config.patch == 8
