"""A segmenter's study with wrong settings is refused with its line before a volume is read or a folder made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medlore.cli import main
from medlore.decomposing.segmenters.few_shot import FewShotSettings, plan_tuning
from medlore.decomposing.segmenters.settings import SegmentationSettings
from medlore.decomposing.segmenters.study import read_study
from medlore.decomposing.segmenters.workshop import settings_rules
from medlore.errors import InputError, UnknownNameError
from medlore.files import write_text
from medlore.models.segmenter.bundle import load_segmenter
from medlore.runs.settings import read_settings
from small_segmenter import write_small_pack
from tiny_segmentation import STUDY


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
        ({"patches": {"augment": "x"}}, r"line \d+, patches\.augment: .*boolean, got 'x'"),
        ({"patches": {"weights": 3}}, r"line \d+, patches\.weights: .*dictionary, got 3"),
        ({"patches": {"weights": {"ball": "much"}}}, r"line \d+, patches\.weights\.ball: .*number, got 'much'"),
        ({"patches": {"wieghts": {}}}, r"line \d+, patches\.wieghts: unknown setting; the nearest are weights"),
        ({"patches": {"warp": {"scale": [1.2, 0.8]}}}, r"line \d+, patches\.warp\.scale: the smallest comes first"),
        ({"patches": {"grey": 4}}, r"line \d+, patches\.grey: settings by name"),
        ({"patches": {"synthesis": {"bias": 1.0}}}, r"line \d+, patches\.synthesis: unknown setting"),
        ({"synthesis": {"deviation": [1.0]}}, r"line \d+, synthesis\.deviation\.1: "),
        ({"synthesis": {"noise": -1}}, r"line \d+, synthesis\.noise: no number of these rules is below 0"),
        ({"synthesis": {"gamma": "wide"}}, r"line \d+, synthesis\.gamma: .*number, got 'wide'"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_with(tmp_path, **changes)
    with pytest.raises(InputError, match=said):
        read_study(study)
    assert main(["decompose", str(study), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "To do:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_faults_of_rules_come_with_the_others_and_each_with_its_line(tmp_path: Path) -> None:
    text = "patches:\n  augment: x\n  weights: 3\n"
    with pytest.raises(InputError) as caught:
        read_settings(
            SegmentationSettings, write_text(tmp_path / "s.yaml", f"name: a\ndata: [{{name: b, cases: c.jsonl}}]\nsteps: 3\n{text}")
        )
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "line 5, patches.augment",
        "line 6, patches.weights",
        "line 3, steps",
    ]
    (tmp_path / "tune.yaml").write_text(f"model: m\ncases: c.jsonl\n{text}")
    with pytest.raises(InputError, match=r"line 4, patches\.augment: (.|\n)*line 5, patches\.weights: "):
        read_settings(FewShotSettings, tmp_path / "tune.yaml")


def test_lists_and_whole_numbers_of_yaml_are_rules() -> None:
    patches = {"augment": False, "least_voxels": 2, "jitter": 0, "weights": {"ball": 3}, "warp": {"scale": [0.9, 1.1]}}
    settings = SegmentationSettings.model_validate({
        "name": "a", "data": [{"name": "b", "cases": "c.jsonl"}], "patches": patches, "synthesis": {"deviation": [1, 2.5]},
    })  # fmt: skip
    assert settings.patches == patches
    rules = settings_rules(settings)
    assert (rules.warp.scale, rules.synthesis.deviation, rules.weights) == ((0.9, 1.1), (1, 2.5), {"ball": 3})


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
