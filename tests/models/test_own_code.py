"""Nothing in a model folder is executed, asked for or not; counts, headers and sizes are checked before anything is made."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import medlore
import timm_restated as restated
from medlore.errors import CheckpointError
from medlore.models.backbones.reading import load_backbone

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small ViT of transformers."""
    transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def with_own_code(folder: Path, model_type: str) -> Path:
    """The same with code that leaves a trace when it runs."""
    trace = f"import pathlib\npathlib.Path({str(folder.parent / 'executed')!r}).write_text('yes')\n"
    (folder / "configuration_own.py").write_text(
        trace + f"from transformers import PretrainedConfig\nclass OwnConfig(PretrainedConfig):\n    model_type = {model_type!r}\n"
    )
    (folder / "modeling_own.py").write_text(
        trace + "from transformers import PreTrainedModel\nclass OwnModel(PreTrainedModel):\n    pass\n"
    )
    maps = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForImageClassification": "modeling_own.OwnModel"}
    change(folder, auto_map=maps, model_type=model_type)
    return folder


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("model_type", ["vit", "own_thing"])
def test_a_folder_with_code_is_refused_and_its_code_not_run(folder: Path, model_type: str) -> None:
    with_own_code(folder, model_type)
    with pytest.raises(CheckpointError, match=r"auto_map: configuration_own\.OwnConfig\), which is never executed"):
        load_backbone(folder, classes=2)
    plan = medlore.plan_ranks(folder, rule="uniform:2")  # weights by their names need no code
    assert len(plan.layers) == 6
    assert not (folder.parent / "executed").exists()


def test_nothing_is_asked_in_a_terminal(folder: Path) -> None:
    """A question that is answered with y ran the code: so there is none, and the reading ends at once."""
    with_own_code(folder, "own_thing")
    main, side = pty.openpty()
    code = f"from medlore.models.backbones.reading import load_backbone\nload_backbone({str(folder)!r}, classes=2)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=side, stdout=side, stderr=side, env=environment) as child:
        os.close(side)
        os.write(main, b"y\ny\ny\ny\n")
        shown = b""
        while child.poll() is None or select.select([main], [], [], 0.1)[0]:
            try:
                shown += os.read(main, 65536)
            except OSError:  # the other side is closed
                break
    os.close(main)
    assert child.returncode == 1
    assert not (folder.parent / "executed").exists()
    assert b"never executed" in shown.replace(b"\r\n", b" ")
    assert b"[y/N]" not in shown


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: 10000000"),
        ({"num_labels": 10**9}, "num_labels: 1000000000"),
        ({"hidden_size": 10**8}, "hidden_size: 100000000"),
        ({"intermediate_size": 10**9}, "intermediate_size: 1000000000"),
    ],
)
def test_counts_that_the_weights_cannot_have(folder: Path, values: dict[str, int], fault: str) -> None:
    change(folder, **values)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: load_backbone(folder, classes=2), lambda: medlore.plan_ranks(folder)):
        with pytest.raises(CheckpointError, match="counts that its weights cannot have") as caught:
            read()
        assert caught.value.faults[0].startswith(fault)
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_configuration_far_larger_than_its_files(folder: Path) -> None:
    change(folder, hidden_size=4000, intermediate_size=4000, num_attention_heads=8)
    with pytest.raises(CheckpointError, match=r"a configuration of \d+,\d+,\d+ parameters beside weights of"):
        load_backbone(folder, classes=2)


def lying(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"blocks.0.attn.qkv.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


LIES = {
    "longer than the file": lying(b"{}", length=1 << 60),
    "longer than any": lying(b" " * ((32 << 20) + 1)),
    "shape beyond the data": lying(entry([1 << 20, 1 << 20], 48), b"\0" * 48),
    "shape that overflows": lying(entry([1 << 40, 1 << 40], 48), b"\0" * 48),
    "offsets beyond the file": lying(entry([3, 4], 1 << 50), b"\0" * 48),
    "no JSON": lying(b"{" * 100),
    "unknown type": lying(entry([3, 4], 48, "F1000"), b"\0" * 48),
    "negative sides": lying(entry([-3, 4], 48), b"\0" * 48),
    "nothing": b"",
    "seven bytes": b"\0" * 7,
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (medlore.plan_ranks, lambda p: load_backbone(p, classes=2)):
        with pytest.raises(CheckpointError):
            read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_timm_folder_is_read_by_its_names(tmp_path: Path) -> None:
    save_file(restated.random_vit("timm"), tmp_path / "model.safetensors")
    stated = {"input_size": [3, 16, 16], "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "pretrained_cfg": stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(tmp_path, classes=3)
    assert backbone.model(pixel_values=torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)
    assert "read as timm-vit" in backbone.notes
    assert (backbone.mean, backbone.std, backbone.interpolation) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3), "bilinear")
