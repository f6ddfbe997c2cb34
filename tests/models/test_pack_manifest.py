"""Packs that were edited, cut off, or written by another version: one error that names the entry, before any weight is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medlore.cli import main
from medlore.errors import CheckpointError, UnknownNameError
from medlore.files import sha256_of
from medlore.inspecting.files import describe
from medlore.models import packs
from medlore.models.classifier_pack import load_classifier_pack
from medlore.models.segmenter.bundle import load_segmenter
from medlore.models.segmenter.checkpoints import read_segmenter
from small_classifier import make_pack
from small_segmenter import SIZES, write_small_pack

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packs")
    return {"segmenter": write_small_pack(folder / "segmenter"), "classifier": make_pack(folder / "classifier", "shufflenet")}


@pytest.fixture
def altered(whole: dict[str, Path], tmp_path: Path) -> Callable[[str, Change], Path]:
    def alter(kind: str, change: Change) -> Path:
        pack = Path(shutil.copytree(whole[kind], tmp_path / "pack"))
        manifest = json.loads((pack / "manifest.json").read_text())
        change(manifest)
        (pack / "manifest.json").write_text(json.dumps(manifest))
        return pack

    return alter


def at(*place: str, value: Any = None, gone: bool = False) -> Change:
    """A change of one entry of a manifest."""

    def change(manifest: dict[str, Any]) -> None:
        *way, last = place
        for name in way:
            manifest = manifest[name]
        if gone:
            del manifest[last]
        else:
            manifest[last] = value

    return change


WRONG: list[tuple[str, Change, str]] = [
    ("segmenter", at("experts", "brain", value=3), r"experts\.brain: not a mapping"),
    ("segmenter", at("experts", "brain", value={}), r"experts\.brain\.file: None is not among the files"),
    ("segmenter", at("experts", "brain", "file", value="../../etc"), r"experts\.brain\.file: '\.\./\.\./etc' is not among"),
    ("segmenter", at("experts", "brain", "file", value=[3]), r"experts\.brain\.file: \[3\] is not among"),
    ("segmenter", at("experts", "brain", "layout", gone=True), r"experts\.brain\.layout: None is none of"),
    ("segmenter", at("experts", "brain", "scaling", value=3), r"experts\.brain\.scaling: not layer -> number"),
    ("segmenter", at("experts", "brain", "scaling", value={"a": "b"}), r"experts\.brain\.scaling: not layer -> number"),
    ("segmenter", at("form", value="round"), r"form: 'round' is none of plain"),
    ("segmenter", at("lora_alpha", value="x"), r"lora_alpha: 'x' is no number"),
    ("segmenter", at("region", value=["brain"]), r"region: \['brain'\] is no name"),
    ("segmenter", at("about", value=[1]), r"about: not a mapping"),
    ("segmenter", at("parameters", value=True), r"parameters: of a wrong kind"),
    ("segmenter", at("prompts", value=[1]), r"prompts: no mapping with `keys`"),
    ("segmenter", at("prompts", "keys", value=[1]), r"prompts: no mapping with `keys`"),
    ("segmenter", at("prompts", "text_sha256", value=1), r"prompts\.text_sha256: 1 is no hash"),
    ("segmenter", at("config", "patch", value=8.0), r"patch 8\.0 is no whole number"),
    ("segmenter", at("config", "features", value=6), r"features 6 is no list of whole numbers"),
    ("segmenter", at("config", "mask_activation", value="relu"), r"mask_activation 'relu' is none of gelu, none"),
    ("segmenter", at("config", "mask_activation", value=["none"]), r"mask_activation \('none',\) is none of gelu, none"),
    ("segmenter", at("files", "../x", value="00"), r"files: '\.\./x' lies outside the pack"),
    ("segmenter", at("files", "base.safetensors", gone=True), r"files: no base\.safetensors"),
    *(
        ("segmenter", at("preprocessing", name, value=value), rf"preprocessing\.{name}: ")
        for name, value in {
            "orientation": "RAR",
            "spacing_mm": {"ct": [1, 1]},
            "roi_size": [16, 16],
            "overlap": "x",
            "foreground_above": None,
            "gaussian_sigma": 0,
            "threshold": 1.5,
            "intensity": {"ct": {"clip": [5, 1]}},
            "label_regions": [1],
        }.items()
    ),
    ("classifier", at("files", "experts/two.safetensors", gone=True), r"files: no experts/two\.safetensors"),
    ("classifier", at("files", "base.safetensors", value=5), r"files: 'base\.safetensors' has 5 for a SHA-256"),
    ("classifier", at("batchnorm", value=["x"]), r"batchnorm: \['x'\]"),
]


@pytest.mark.parametrize(("kind", "change", "said"), WRONG)
def test_a_wrong_entry_of_a_manifest_is_named(
    kind: str, change: Change, said: str, altered: Callable[[str, Change], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = altered(kind, change)
    read = load_segmenter if kind == "segmenter" else load_classifier_pack
    for reader in (read, describe):
        with pytest.raises(CheckpointError, match=said):
            reader(pack)
    expert = "brain" if kind == "segmenter" else "two"
    assert main(["export", str(pack), "--expert", expert, "--out", str(tmp_path / "out")]) == 2
    assert "To do:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["segmenter", "classifier"])
@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("medlore/expert-pack/99", "of a newer version of MedLoRE.*update medlore"),
        ("medlore/expert-pack/0", "made by an older version of MedLoRE.*make it again with the study"),
        ("medlore/expert-pack/²", "schema 'medlore/expert-pack/²'"),
        (["x"], r"schema \['x'\]"),
        (None, "schema None"),
    ],
)
def test_another_format_is_recognised_by_its_version(kind: str, schema: Any, said: str, altered: Callable[[str, Change], Path]) -> None:
    pack = altered(kind, at("schema", value=schema))
    with pytest.raises(CheckpointError, match=said):
        describe(pack)


def test_a_kind_that_is_none_gets_the_nearest(altered: Callable[[str, Change], Path]) -> None:
    with pytest.raises(UnknownNameError, match=r"kind: unknown name 'classifer'.*'classifier'"):
        describe(altered("classifier", at("kind", value="classifer")))


def test_scalings_by_position_are_of_an_older_version(whole: dict[str, Path], tmp_path: Path) -> None:
    """Format 1 kept one vector of scalings a layer in the base; packs of it with scalings by name are read."""
    pack = Path(shutil.copytree(whole["classifier"], tmp_path / "pack"))
    manifest = json.loads((pack / "manifest.json").read_text())
    manifest["schema"] = "medlore/expert-pack/1"
    (pack / "manifest.json").write_text(json.dumps(manifest))
    assert load_classifier_pack(pack).experts.keys() == {"one", "two"}
    state = {name: load_file(pack / name) for name in manifest["files"]}
    for name in ("experts/one.safetensors", "experts/two.safetensors"):
        for key in [key for key in state[name] if ".lora_scaling." in key]:
            state["base.safetensors"][key.rpartition(".")[0]] = torch.full((2,), 2.0, dtype=torch.float64)
            del state[name][key]
    for name, tensors in state.items():
        save_file(tensors, pack / name)
        manifest["files"][name] = sha256_of(pack / name)
    (pack / "manifest.json").write_text(json.dumps(manifest))
    for reader in (load_classifier_pack, describe):
        with pytest.raises(CheckpointError, match=r"older version of MedLoRE \(its scalings are kept by position\).*with the study"):
            reader(pack)


def test_weights_that_no_manifest_names_are_reported(whole: dict[str, Path], tmp_path: Path) -> None:
    for kind, pack in whole.items():
        copy = Path(shutil.copytree(pack, tmp_path / kind))
        assert not any("never read" in note for note in describe(copy)["notes"])
        (copy / "experts" / "three.safetensors").write_bytes(b"x")
        assert "not of this pack, and never read: experts/three.safetensors" in describe(copy)["notes"]
        assert packs.strangers(copy, json.loads((copy / "manifest.json").read_text())) == ["experts/three.safetensors"]


def test_the_base_of_a_pack_is_not_taken_for_a_published_file(whole: dict[str, Path], tmp_path: Path) -> None:
    base = whole["segmenter"] / "base.safetensors"
    with pytest.raises(CheckpointError, match=r"the base of a pack.*name the folder"):
        read_segmenter(base)
    copy = Path(shutil.copy(base, tmp_path / "mine.safetensors"))
    assert read_segmenter(copy).config.features == SIZES.features


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("classifier", ["export", "--expert", "two", "--text", "x", "--lora-alpha", "3"], "--text, --lora-alpha: given for the pack of a"),
        ("segmenter", ["export", "--expert", "brain", "--format", "onnx"], "--format: given for a segmenter"),
        ("classifier", ["info", "--lora-alpha", "3"], "--lora-alpha: given for a pack"),
    ],
)
def test_flags_that_could_not_act_are_refused(
    kind: str, arguments: list[str], said: str, whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *flags = arguments
    out = ["--out", str(tmp_path / "out")] if verb == "export" else []
    assert main([verb, str(whole[kind]), *flags, *out]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
