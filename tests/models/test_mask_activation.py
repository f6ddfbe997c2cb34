"""A segmenter without an activation after the mask embedding: every reader and writer of a pack keeps the choice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from medlore.decomposing.segmenters.settings import SizeSettings
from medlore.errors import InputError
from medlore.inspecting.files import describe
from medlore.models.segmenter.bundle import load_segmenter
from medlore.models.segmenter.experts import collect_weights, segmenter_with_experts
from medlore.models.segmenter.network import SAT_NANO, Segmenter, SegmenterConfig
from medlore.models.segmenter.unet3d_inference import ready_for_cpu
from medlore.segmenting.export import export
from small_segmenter import SIZES, write_small_pack

PLAIN = dataclasses.replace(SIZES, mask_activation="none", deep_widths=(8,))
WINDOW = torch.randn(1, 3, 16, 16, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_pack(tmp_path_factory.mktemp("packs") / "pack", sizes=PLAIN)


def answer(network: Segmenter, queries: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(WINDOW, queries)


def test_the_choice_survives_json_and_what_is_unknown_is_a_fault() -> None:
    assert SegmenterConfig.from_dict(json.loads(json.dumps(PLAIN.to_dict()))) == PLAIN
    assert SegmenterConfig.from_dict({k: v for k, v in SIZES.to_dict().items() if k != "mask_activation"}).mask_activation == "gelu"
    assert dataclasses.replace(SAT_NANO, mask_activation="none").name == "segmenter", "it is none of the published networks"
    for wrong in ("relu", None, 3):
        with pytest.raises(InputError, match=r"1 fault") as caught:
            dataclasses.replace(SIZES, mask_activation=wrong)
        assert caught.value.faults == (f"mask_activation {wrong!r} is none of gelu, none",)
    sizes = {name: value for name, value in PLAIN.to_dict().items() if name != "mask_activation"}
    assert SizeSettings(**sizes).config() == PLAIN  # what a study trains unless it says gelu
    assert SizeSettings(**sizes, mask_activation="gelu").config().mask_activation == "gelu"


def test_names_and_shapes_stay_and_logits_reach_below_what_gelu_allows() -> None:
    torch.manual_seed(0)
    plain = Segmenter(PLAIN).eval()
    published = Segmenter(dataclasses.replace(PLAIN, mask_activation="gelu")).eval()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in published.state_dict().items()}
    published.load_state_dict(plain.state_dict())
    queries = 3 * torch.randn(4, PLAIN.query_width)
    with torch.no_grad():
        features = plain.encode(WINDOW, deep=True)
        ours, theirs = plain.mask_embeddings(features, queries), published.mask_embeddings(features, queries)
        deep = [m.deep_logits(features, queries)[1] for m in (plain, published)]
    torch.testing.assert_close(nn.functional.gelu(ours), theirs)
    assert float(theirs.min()) > -0.17 > float(ours.min())
    assert not torch.allclose(*deep), "the heads of deep supervision have the same choice"


def test_a_pack_its_merged_expert_and_its_trained_copy_answer_alike(pack: Path, tmp_path: Path) -> None:
    whole = load_segmenter(pack)
    assert whole.config == PLAIN
    queries = whole.queries(["brainstem", "hippocampus"], "mri")
    wanted = answer(whole.network("brain"), queries)
    assert not torch.equal(wanted, answer(whole.network(None), queries))
    export(pack, tmp_path / "copy")
    export(pack, tmp_path / "brain", expert="brain")
    for name in ("copy", "brain"):
        bundle = load_segmenter(tmp_path / name)
        assert bundle.config.mask_activation == "none"
        torch.testing.assert_close(answer(bundle.network("brain"), queries), wanted)
    again = collect_weights(segmenter_with_experts(whole.weights))
    assert again.config == PLAIN
    quick = ready_for_cpu(whole.network("brain"), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(quick.decode(quick.encode(WINDOW), queries), wanted, rtol=1e-4, atol=1e-4)
    program = torch.export.export(whole.network("brain"), (WINDOW, queries))
    torch.testing.assert_close(program.module()(WINDOW, queries), wanted, rtol=1e-4, atol=1e-5)


def test_info_names_the_choice_where_it_is_not_the_published_one(pack: Path, tmp_path: Path) -> None:
    assert describe(pack)["mask_activation"] == "none"
    assert "mask_activation" not in describe(write_small_pack(tmp_path / "published"))
