"""The forward of the official modules, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from golden.formula import assert_golden, formula_weight, golden_queries, golden_window, read_golden
from medlore.models.segmenter.network import SAT_NANO, Segmenter


def test_sat_nano_forward_is_the_official_one(golden: Path) -> None:
    expected = read_golden(golden / "lorkd_forward_sat_nano.json")
    model = Segmenter(SAT_NANO).eval()
    model.load_state_dict({name: formula_weight(name, tuple(weight.shape)) for name, weight in model.state_dict().items()})
    with torch.inference_mode():
        features = model.encode(golden_window())
        logits = model.decode(features, golden_queries())
    assert_golden(features.tokens.transpose(0, 1), expected["image_embedding"])
    assert_golden(features.pixels, expected["per_pixel0"])
    assert_golden(logits, expected["logits"])


def test_positional_encoding_is_the_official_one(golden: Path) -> None:
    from medlore.models.segmenter.positional import positional_encoding

    expected = read_golden(golden / "lorkd_forward_sat_nano.json")["pos"]
    assert_golden(positional_encoding((2, 2, 1), 768).flatten(0, 2)[:, None], expected, tolerance=1e-6)
    large = positional_encoding((9, 9, 3), 768)
    assert float(large[8, 7, 2, 5]) == pytest.approx(0.7993825, abs=1e-6)
    assert float(large.double().sum()) == pytest.approx(92998.663, rel=1e-6)
