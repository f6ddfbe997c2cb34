from __future__ import annotations

from pathlib import Path

import pytest
import torch

from golden.published import TINY, filled, lorkd_shapes
from medlore.layers.experts.routing import route
from medlore.models.segmenter.bundle import load_segmenter, write_segmenter_pack
from medlore.models.segmenter.checkpoints import SegmenterWeights, segmenter_weights
from medlore.models.segmenter.experts import collect_weights, segmenter_with_experts
from medlore.models.segmenter.network import SegmenterConfig
from medlore.models.segmenter.vocabulary import REGIONS

SMALL = SegmenterConfig.from_dict({**TINY.to_dict(), "patch": 8})


@pytest.fixture(params=["imbalanced", "balanced"])
def weights(request: pytest.FixtureRequest) -> SegmenterWeights:
    ranks = (3, 2, 2, 1, 2, 2, 3, 1) if request.param == "imbalanced" else (2,) * 8
    read = segmenter_weights(filled(lorkd_shapes(SMALL, ranks)))
    assert read.form == request.param
    return SegmenterWeights(SMALL, read.base, read.experts, read.form, read.lora_alpha)


def test_a_mixed_batch_equals_the_merged_networks(weights: SegmenterWeights, tmp_path: Path) -> None:
    """What LoRKD calls efficient knowledge separation: one batch, an expert for each sample."""
    model = segmenter_with_experts(weights).eval()
    write_segmenter_pack(tmp_path / "pack", weights)
    bundle = load_segmenter(tmp_path / "pack")
    x, queries = torch.randn(3, 3, 16, 8, 8), torch.randn(2, 24)
    regions = ["thorax", "abdomen", "thorax"]
    with torch.inference_mode(), route(model, experts=regions):
        together = model(x, queries)
    for sample, region in enumerate(regions):
        with torch.inference_mode():
            alone = bundle.network(region)(x[sample : sample + 1], queries)
        torch.testing.assert_close(together[sample : sample + 1], alone, atol=1e-4, rtol=1e-4)


def test_absent_experts_get_no_gradient(weights: SegmenterWeights) -> None:
    model = segmenter_with_experts(weights).train()
    with route(model, experts=["brain", "pelvis"]):
        model(torch.randn(2, 3, 16, 8, 8), torch.randn(2, 24)).square().mean().backward()
    names = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for name, parameter in names.items():
        present = name.rsplit(".", 1)[1] in ("brain", "pelvis")
        seen = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert seen == present, name


def test_weights_survive_the_round_trip(weights: SegmenterWeights) -> None:
    back = collect_weights(segmenter_with_experts(weights))
    assert (back.config, back.form, list(back.experts)) == (weights.config, weights.form, list(weights.experts))
    assert back.parameters() == weights.parameters()
    for region in (None, *REGIONS):
        ours, theirs = back.merged(region), weights.merged(region)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_training_changes_no_file_that_was_loaded(weights: SegmenterWeights) -> None:
    before = {name: tensor.clone() for name, tensor in weights.base.items()}
    model = segmenter_with_experts(weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(weights.base[name], before[name]) for name in before)
