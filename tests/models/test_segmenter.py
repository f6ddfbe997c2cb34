from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golden.formula import read_key_list
from medlore.errors import InputError
from medlore.models.segmenter.network import (
    LORKD_NANO,
    LORKD_PRO,
    SAT_NANO,
    SAT_PRO,
    Segmenter,
    SegmenterConfig,
    count_parameters,
    expert_targets,
)

TINY = SegmenterConfig(
    features=(4, 6, 8),
    strides=(1, 2, 2),
    patch=8,
    query_width=24,
    projection_width=20,
    mask_width=12,
    heads=4,
    feedforward=16,
    decoder_layers=2,
    deep_widths=(10,),
)


@pytest.fixture
def model() -> Segmenter:
    return Segmenter(TINY).eval()


def without_deep(config: SegmenterConfig) -> SegmenterConfig:
    return SegmenterConfig.from_dict({**config.to_dict(), "deep_widths": []})


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SAT_NANO, 110_277_568),
        (without_deep(SAT_NANO), 109_194_624),
        (SAT_PRO, 477_087_360),
        (without_deep(SAT_PRO), 475_561_344),
        (LORKD_NANO, 57_235_872),
        (LORKD_PRO, 109_194_624),
    ],
)
def test_parameter_counts_are_the_published_ones(config: SegmenterConfig, parameters: int) -> None:
    assert count_parameters(config) == parameters


@pytest.mark.parametrize(("config", "part", "parameters"), [
    (SAT_NANO, "backbone", 73_919_040),
    (SAT_PRO, "backbone", 435_435_136),
    (SAT_NANO, "transformer_decoder", 33_094_656),
    (SAT_NANO, "projection_layer", 1_967_616),
    (SAT_PRO, "projection_layer", 6_686_976),
    (SAT_NANO, "mask_embed_proj", 213_312),
    (SAT_PRO, "mask_embed_proj", 344_576),
])  # fmt: skip
def test_parts_have_the_published_sizes(config: SegmenterConfig, part: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Segmenter(config)
    assert sum(p.numel() for p in model.get_submodule(part).parameters()) == parameters


@pytest.mark.parametrize(("config", "file"), [(SAT_NANO, "sat_nano"), (SAT_PRO, "sat_pro")])
def test_names_and_shapes_are_the_published_ones(config: SegmenterConfig, file: str, golden: Path) -> None:
    published = read_key_list(golden / f"lorkd_keys_{file}.txt")
    with torch.device("meta"):
        ours = {f"module.{name}": tuple(weight.shape) for name, weight in Segmenter(config).state_dict().items()}
    assert ours == {name: shape for name, shape in published.items() if ".all_modules." not in name}


@pytest.mark.parametrize(("config", "units", "weights"), [(LORKD_NANO, 152_721, 21_180_960), (LORKD_PRO, 311_121, 69_346_368)])
def test_expert_targets_cost_what_was_published(config: SegmenterConfig, units: int, weights: int) -> None:
    with torch.device("meta"):
        model = Segmenter(config)
    convs = {name: model.get_submodule(name) for name in expert_targets(config)}
    # A (r k, i k^2) and B (o k, r k) with k = 3: 9 r (3 i + o) numbers
    cost = sum(9 * units * (3 * convs[name].in_channels + convs[name].out_channels) for name, units in expert_targets(config).items())
    assert cost == units
    assert sum(conv.weight.numel() for conv in convs.values()) == weights


def test_answers_to_prompts_do_not_depend_on_their_company(model: Segmenter) -> None:
    features = model.encode(torch.randn(2, 3, 16, 8, 8))
    queries = torch.randn(7, 24)
    together = model.decode(features, queries)
    groups = torch.cat([model.decode(features, queries[i : i + 3]) for i in (0, 3, 6)], dim=1)
    torch.testing.assert_close(groups, together, atol=1e-5, rtol=1e-5)


def test_prompts_may_differ_by_sample(model: Segmenter) -> None:
    x, queries = torch.randn(2, 3, 16, 8, 8), torch.randn(2, 5, 24)
    logits = model(x, queries)
    assert logits.shape == (2, 5, 16, 8, 8)
    torch.testing.assert_close(logits[1:], model(x[1:], queries[1]), atol=1e-5, rtol=1e-5)


def test_positions_reach_the_answer(model: Segmenter) -> None:
    """Two tokens that swap places give another answer: the keys carry positions."""
    from dataclasses import replace

    features = replace(model.encode(torch.randn(1, 3, 16, 8, 8)), tokens=torch.randn(1, 2, 24))
    swapped = replace(features, tokens=features.tokens.flip(1))
    queries = torch.randn(2, 24)
    difference = model.decoded_queries(features, queries) - model.decoded_queries(swapped, queries)
    assert float(difference.detach().abs().max()) > 1e-3


def test_deep_supervision_heads_see_the_lower_maps(model: Segmenter) -> None:
    features = model.encode(torch.randn(1, 3, 16, 8, 8), deep=True)
    logits = model.deep_logits(features, torch.randn(2, 24))
    assert [tuple(level.shape) for level in logits] == [(1, 2, 16, 8, 8), (1, 2, 8, 4, 4)]
    with pytest.raises(InputError, match="no lower maps"):
        model.deep_logits(model.encode(torch.randn(1, 3, 16, 8, 8)), torch.randn(2, 24))


@pytest.mark.parametrize("shape", [(1, 3, 16, 8, 12), (1, 1, 16, 8, 8), (3, 16, 8, 8), (1, 3, 0, 8, 8)])
def test_windows_that_do_not_fit_are_refused(model: Segmenter, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        model.encode(torch.zeros(shape))


def test_a_window_of_one_voxel_at_the_bottom_is_refused() -> None:
    model = Segmenter(SegmenterConfig(**{**TINY.__dict__, "patch": 4, "deep_widths": ()}))
    with pytest.raises(InputError, match="more than 4"):
        model.encode(torch.zeros(1, 3, 4, 4, 4))


def test_all_faults_of_a_config_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        SegmenterConfig(features=(4, 8), strides=(2, 3), query_width=10, heads=4, deep_widths=(1, 2), mask_width=0)
    assert len(caught.value.faults) == 4


def test_config_survives_json() -> None:
    assert SegmenterConfig.from_dict(TINY.to_dict()) == TINY
    assert SAT_PRO.name == "SAT-Pro"
    assert without_deep(SAT_PRO).name == "SAT-Pro"
    assert TINY.name == "segmenter"


def test_sat_pro_runs_on_a_tiny_volume() -> None:
    """The real sizes, 475 million weights, with one value each so that no time goes into drawing them."""
    with torch.device("meta"):
        model = Segmenter(without_deep(SAT_PRO)).eval()
    small = {name: torch.full((1,), 0.02).expand(weight.shape) for name, weight in model.state_dict().items()}
    model.load_state_dict(small, assign=True)
    x = torch.randn(1, 1, 64, 32, 32).expand(-1, 3, -1, -1, -1)
    with torch.inference_mode():
        logits = model(x, torch.randn(2, 768))
    assert logits.shape == (1, 2, 64, 32, 32)
    assert bool(logits.isfinite().all())


def test_a_network_without_values_draws_none() -> None:
    """Drawing on the meta device imports hundreds of modules of torch: seconds before the first case."""
    program = (
        "import sys, torch\n"
        "from medlore.models.segmenter.network import LORKD_NANO, Segmenter\n"
        "before = set(sys.modules)\n"
        "with torch.device('meta'): Segmenter(LORKD_NANO)\n"
        "print(len(set(sys.modules) - before))"
    )
    assert int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout) < 50
