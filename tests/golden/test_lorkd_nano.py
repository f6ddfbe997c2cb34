"""A file of LoRKD-Nano's exact keys, shapes and size, from disk to the official logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from golden.formula import assert_golden, golden_queries, golden_window, read_golden, read_key_list
from golden.published import LORKD_NANO_RANKS, filled, write_published
from medlore.cli import main
from medlore.models.segmenter.bundle import load_segmenter
from medlore.models.segmenter.vocabulary import REGIONS


@pytest.fixture(scope="module")
def nano_file(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = filled(read_key_list(golden / "lorkd_keys_lorkd_nano.txt"))
    return write_published(tmp_path_factory.mktemp("nano") / "lorkd-imbalance-nano.pth", state, training=False)


def test_merged_experts_give_the_official_logits(nano_file: Path, golden: Path) -> None:
    """The official forward holds tasks 0 and 6 in one batch; here each sample goes through its own merged network."""
    expected = read_golden(golden / "lorkd_forward_lorkd_nano.json")
    bundle = load_segmenter(nano_file)
    features, logits = [], []
    with torch.inference_mode():
        for sample, task in enumerate((0, 6)):
            network = bundle.network(REGIONS[task])
            features.append(network.encode(golden_window()[sample : sample + 1]))
            logits.append(network.decode(features[-1], golden_queries()))
    assert_golden(torch.cat([f.tokens for f in features]).transpose(0, 1), expected["image_embedding"])
    assert_golden(torch.cat([f.pixels for f in features]), expected["per_pixel0"])
    assert_golden(torch.cat(logits), expected["logits"])


def test_info_says_what_it_is(nano_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(nano_file)]) == 0
    shown = capsys.readouterr()
    assert "LoRKD-Nano" in shown.out
    assert "67,315,458" in shown.out
    assert "imbalanced" in shown.err
    assert main(["info", str(nano_file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 67_315_458
    assert {e["region"]: e["rank"] for e in facts["experts"]} == dict(zip(REGIONS, LORKD_NANO_RANKS, strict=True))
    sizes = [1_832_652, 1_527_210, 1_527_210, 610_884, 1_221_768, 1_221_768, 1_832_652, 305_442]
    assert [e["parameters"] for e in facts["experts"]] == sizes


def test_one_expert_is_exported_as_a_plain_network(nano_file: Path, tmp_path: Path) -> None:
    assert main(["export", str(nano_file), "--expert", "thorax", "--out", str(tmp_path / "thorax")]) == 0
    merged = load_segmenter(tmp_path / "thorax")
    assert merged.weights.parameters() == 57_235_872
    theirs = load_segmenter(nano_file).network("thorax").state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in merged.network("thorax").state_dict().items())
