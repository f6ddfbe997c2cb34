"""Files that are JSON in name alone end in one sentence, whichever door they come through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medlore.data.volumes.cases import read_cases
from medlore.errors import CheckpointError, DataError, InputError, StepError
from medlore.files import read_json
from medlore.ranks.plan import is_plan_file
from medlore.segmenting.labels import facts_of_pack

NESTED = "[" * 100_000
LONG = "1" * 5_000


@pytest.mark.parametrize("text", [NESTED, LONG])
def test_json_beyond_the_reader_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"a\.json: not JSON"):
        read_json(file)


@pytest.mark.parametrize("text", [NESTED, LONG])
def test_such_a_line_of_a_case_list_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(f"\n{text}\n")
    with pytest.raises(DataError, match="line 2: not JSON that can be read"):
        read_cases(file)


def test_a_nested_file_is_no_plan_and_no_rank_list(tmp_path: Path) -> None:
    from medlore.ranks.rules import _read_list

    file = tmp_path / "ranks.json"
    file.write_text(NESTED)
    assert not is_plan_file(file)
    with pytest.raises(DataError, match="neither JSON nor a list"):
        _read_list(file)


@pytest.mark.parametrize("manifest", [[1], None, {"kind": "segmenter"}, {"kind": "segmenter", "prompts": 3, "parameters": "x"}])
def test_a_manifest_with_faults_is_left_to_the_loader(tmp_path: Path, manifest: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert facts_of_pack(tmp_path) is None


def test_an_adapter_configuration_that_is_a_list(tmp_path: Path) -> None:
    from medlore.inspecting.files import describe

    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: a list"):
        describe(tmp_path)


@pytest.mark.parametrize("record", [[1], {"labels": ["liver"]}, {"labels": []}])
def test_a_strange_record_of_a_case_is_a_fault_of_that_case(tmp_path: Path, record: Any) -> None:
    import nibabel as nib
    import numpy as np

    from medlore.segmenting.evaluate import evaluate_masks

    folder = tmp_path / "pred" / "a"
    folder.mkdir(parents=True)
    (folder / "case.json").write_text(json.dumps(record))
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "truth.nii.gz")
    line = {"image": "a.nii.gz", "label": ["liver"], "modality": "ct", "mask": "truth.nii.gz"}
    (tmp_path / "cases.jsonl").write_text(json.dumps(line))
    with pytest.raises(StepError, match="not the record of a case"):
        evaluate_masks(tmp_path / "pred", tmp_path / "cases.jsonl", out=tmp_path / "out")


@pytest.mark.parametrize("prompts", ["{", '{"ct/liver": 0}', "[1]"])
def test_a_prompt_table_with_a_broken_header(tmp_path: Path, prompts: str) -> None:
    import torch
    from safetensors.torch import save_file

    from medlore.models.segmenter.prompts import PromptTable

    file = tmp_path / "table.safetensors"
    save_file({"embeddings": torch.zeros(1, 4)}, file, metadata={"prompts": prompts, "schema": "any"})
    with pytest.raises(CheckpointError, match="in its header"):
        PromptTable.read(file)


def test_shards_are_looked_for_beside_the_index_alone(tmp_path: Path) -> None:
    from medlore.ranks.sources import open_source

    (tmp_path / "inner").mkdir()
    (tmp_path / "other.bin").write_bytes(b"")
    (tmp_path / "inner" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../other.bin", "b": ["x"]}}))
    with pytest.raises(CheckpointError, match="shards in other folders"):
        open_source(tmp_path / "inner")


def test_a_word_list_with_ids_of_text(tmp_path: Path) -> None:
    from medlore.models.segmenter.text import _words_of_json

    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"liver": "one"}}}))
    with pytest.raises(CheckpointError, match="no whole numbers"):
        _words_of_json(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", [NESTED, "epochs: 2024-13-01\n", f"epochs: {LONG}\n"])
def test_yaml_beyond_the_reader_is_refused(tmp_path: Path, text: str) -> None:
    from medlore.runs.settings import read_settings
    from medlore.tuning.settings import FinetuneSettings

    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=r"s\.yaml: not YAML"):
        read_settings(FinetuneSettings, tmp_path / "s.yaml")


def test_a_table_without_rows_names_its_columns_in_words(tmp_path: Path) -> None:
    from medlore.data.images.reading import read_images

    (tmp_path / "empty.csv").write_text("image,label\n")
    with pytest.raises(DataError, match=r"no rows.*columns read: 'image' \(image\), 'label' \(label\)\."):
        read_images(tmp_path / "empty.csv")


def test_pickled_arrays_are_refused_without_advice_to_load_them(tmp_path: Path) -> None:
    import numpy as np

    from medlore.data.images.npz import read_npz

    np.savez(tmp_path / "a.npz", images=np.array([object], dtype=object), labels=np.zeros(1))
    with pytest.raises(DataError, match="pickled objects, which are never loaded"):
        read_npz(tmp_path / "a.npz")
