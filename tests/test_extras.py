"""A lean core: what is optional is asked in one place, named with its pip command, and never imported without being asked."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from medlore import extras
from medlore.errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# what a package of the core cannot be installed without, and is known for: its own part under another name
COMES_WITH = {"pydantic_core": "pydantic", "tokenizers": "transformers", "huggingface_hub": "transformers", "packaging": "peft"}
IMPORT_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}  # distributions that are imported by another name


def packages_of(requirements: list[str]) -> set[str]:
    """Import names of the packages in a list of requirements, other extras of this project left out."""
    names = {re.split(r"[\[<>=!~ ;]", line, maxsplit=1)[0].lower() for line in requirements}
    return {IMPORT_NAMES.get(name, name) for name in names - {"medlore"}}


def test_the_core_is_lean() -> None:
    assert len(PROJECT["dependencies"]) <= 15


def test_the_table_of_extras_is_that_of_the_project() -> None:
    declared = {name: packages_of(lines) for name, lines in PROJECT["optional-dependencies"].items() if name not in {"all", "dev"}}
    assert {name: set(packages) for name, packages in extras.EXTRAS.items()} == declared


def test_all_brings_every_extra() -> None:
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(everything.removeprefix("medlore[").removesuffix("]").split(",")) == set(extras.EXTRAS)


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "medlore").rglob("*.py")), ids=lambda p: p.stem)
def test_a_module_imports_what_the_core_has_and_optional_packages_in_functions_alone(path: Path) -> None:
    core = packages_of(PROJECT["dependencies"]) | set(sys.stdlib_module_names) | {"medlore"}
    core |= {part for part, whole in COMES_WITH.items() if whole in core}
    optional = {package for packages in extras.EXTRAS.values() for package in packages} | {"torchvision"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = {
        id(inner)
        for node in tree.body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    on_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for root in {name.split(".")[0] for name in names} - core:
            assert root in optional, f"{path.name}:{node.lineno} imports {root}, which no dependency brings"
            assert id(node) not in on_top or id(node) in typed, f"{path.name}:{node.lineno} imports the optional {root} on top"


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "is_installed", lambda _package: False)
    with pytest.raises(MissingExtraError, match=r"--plot: the package 'matplotlib' is not installed.*pip install 'medlore\[plots\]'"):
        extras.require("matplotlib.figure", "--plot")


def test_without_optional_packages_the_core_verbs_work(tmp_path: Path) -> None:
    hidden = sorted(
        {package for packages in extras.EXTRAS.values() for package in packages} - {"jinja2", "tensorboard"}
    )  # torch needs jinja2
    program = f"""
import importlib.util, sys
hidden = set({hidden!r})
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in hidden else found(name, package)
import numpy as np
from medlore.cli import main
assert main(["ranks", "medlore:vit-mini", "--out", "plan.json"]) == 0
rng = np.random.default_rng(0)
np.savez("few.npz", train_images=rng.integers(0, 255, (12, 28, 28), np.uint8), train_labels=np.arange(12)[:, None] % 2,
         test_images=rng.integers(0, 255, (6, 28, 28), np.uint8), test_labels=np.arange(6)[:, None] % 2)
assert main(["finetune", "--data", "few.npz", "--shots", "2", "--epochs", "1", "--out", "run"]) == 0
import nibabel
nibabel.save(nibabel.Nifti1Image(rng.normal(100, 20, (24, 24, 24)).astype(np.float32), np.diag([6.0, 6.0, 6.0, 1.0])), "head.nii.gz")
asked = ["--image", "head.nii.gz", "--labels", "grey matter", "--modality", "t1", "--model", "medlore:seg-mini"]
assert main(["segment", *asked, "--out", "masks"]) == 0
assert main(["ranks", "medlore:vit-mini", "--plot", "ranks.png"]) == 2
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "medlore[plots]" in done.stderr
    assert (tmp_path / "masks" / "head" / "prediction.nii.gz").is_file()
    assert (tmp_path / "masks" / "head" / "quality_control.png").is_file()  # drawn with Pillow, which the core has
