"""The comparison of results: it must see one changed number, and nothing that a clock or a folder changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from benchmarks._same_digests import Places, values_of
from benchmarks.same_results import main
from safetensors.torch import save_file

HERE = {"machine": {"python": "3"}, "fault": None}


def write_outputs(folder: Path) -> dict[str, Path]:
    """One file of each kind that holds results."""
    folder.mkdir()
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    save_file({"a": values, "b": values.half()}, folder / "w.safetensors")
    torch.save({"net": {"a": values}, "step": 3}, folder / "w.pt")
    np.savez(folder / "w.npz", a=values.numpy())
    report = {"seconds": folder.stat().st_mtime, "results": {"dice": 0.5, "out": str(folder)}, "command": [str(folder)]}
    (folder / "r.json").write_text(json.dumps(report))
    (folder / "r.csv").write_text("case,dice\na,0.5\n")
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.diag([1.0, 2, 3, 1])), folder / "m.nii.gz")
    return {path.name: path for path in folder.iterdir()}


def digests(files: dict[str, Path]) -> dict[str, Any]:
    folder = next(iter(files.values())).parent
    return {name: values_of(path, Places({"work": folder})) for name, path in files.items()}


def test_equal_outputs_in_two_folders_have_equal_digests(tmp_path: Path) -> None:
    first, second = (digests(write_outputs(tmp_path / name)) for name in ("one", "two"))
    assert first == second
    assert first["r.json"] == {"results.dice": 0.5, "results.out": "<work>"}
    assert set(first["w.safetensors"]) == {"a", "b"}
    assert not any("unreadable" in values for values in first.values())


def other_affine(path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.diag([1.0, 2, 3.0001, 1])), path)


def other_tensor(path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    values[1, 2] = torch.nextafter(values[1, 2], torch.tensor(9.0))
    if path.suffix == ".pt":
        torch.save({"net": {"a": values}, "step": 3}, path)
    elif path.suffix == ".npz":
        np.savez(path, a=values.numpy())
    else:
        save_file({"a": values, "b": values.half()}, path)


def other_number(path: Path) -> None:
    path.write_text(path.read_text().replace("0.5", "0.5000000000000001"))


@pytest.mark.parametrize(
    ("name", "change", "entry"),
    [
        ("w.safetensors", other_tensor, "a"),
        ("w.pt", other_tensor, "net.a"),
        ("w.npz", other_tensor, "a"),
        ("m.nii.gz", other_affine, "affine"),
        ("r.json", other_number, "results.dice"),
        ("r.csv", other_number, "[0].dice"),
    ],
)
def test_the_last_bit_of_one_value_is_seen(name: str, change: Any, entry: str, tmp_path: Path) -> None:
    files = write_outputs(tmp_path / "one")
    before = digests(files)[name]
    change(files[name])
    after = digests(files)[name]
    assert {key for key in before if before[key] != after[key]} >= {entry}


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    (folder / "steps").mkdir(parents=True)
    (folder / "steps" / "demo.json").write_text(json.dumps(HERE | record))
    return folder


def test_a_comparison_names_step_file_and_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record: dict[str, Any] = {
        "commands": {"demo": {"status": 0, "stdout": {"table.score": 0.5}}},
        "files": {"demo/plan.json": {"rank": 4, "settings.epochs": 2}, "demo/w.pt": {"a": "x"}},
    }
    changed = copy.deepcopy(record)
    changed["files"] = {"demo/plan.json": {"rank": 5, "settings.training.epochs": 2}}
    changed["commands"]["demo"]["stdout"]["table.score"] = 0.25
    one, same, other = (str(write_record(tmp_path / n, t)) for n, t in (("one", record), ("same", record), ("other", changed)))
    assert main(["compare", one, same, "--only", "demo"]) == 0
    assert "0 commands or files differ" in capsys.readouterr().out
    assert main(["compare", one, same]) == 1  # the other steps are in neither record
    assert f"ranks: not in {one}" in capsys.readouterr().out
    assert main(["compare", one, other, "--only", "demo"]) == 1
    said = capsys.readouterr().out
    for line in ("demo / $ demo: 1 differ", "table.score: 0.5 -> 0.25", "rank: 4 -> 5", "demo / demo/w.pt: 1 differ", "only in the first"):
        assert line in said
    assert "1 entries have the same values under other names: settings.epochs -> settings.training.epochs" in said


def test_stated_changes_are_allowed_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old: dict[str, Any] = {"commands": {}, "files": {"r.json": {"settings.epochs": 2, "dice": 0.5}, "best.pt": {"a": "x"}}}
    new: dict[str, Any] = {"commands": {}, "files": {"r.json": {"settings.training.epochs": 2, "dice": 0.5}}}
    one, two = (str(write_record(tmp_path / n, t)) for n, t in (("one", old), ("two", new)))
    rules = tmp_path / "allow.yaml"
    rules.write_text(
        r"""
- {why: settings are nested, file: 'r\.json', entry: 'settings\.(\w+)', to: 'settings.training.\1'}
- {why: another layout, file: '.*\.pt', drop: true}
"""
    )
    assert main(["compare", one, two, "--only", "demo", "--allow", str(rules)]) == 0
    said = capsys.readouterr().out
    assert "is called settings.training.\\1 (settings are nested): 1 times" in said
    assert "left out (another layout): 1 times" in said
    new["files"]["r.json"]["settings.training.epochs"] = 3
    three = str(write_record(tmp_path / "three", new))
    assert main(["compare", one, three, "--only", "demo", "--allow", str(rules)]) == 1
    assert "settings.training.epochs: 2 -> 3" in capsys.readouterr().out
    rules.write_text("- {file: x, drop: true}")
    with pytest.raises(SystemExit, match="rule 1: needs `why`"):
        main(["compare", one, two, "--allow", str(rules)])
