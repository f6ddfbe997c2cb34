from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden.formula import read_key_list
from golden.published import (
    LORKD_NANO_RANKS,
    LORKD_PRO_RANKS,
    TINY,
    filled,
    lorkd_shapes,
    sat_shapes,
    write_published,
)
from medlore.errors import CheckpointError, InputError, UnknownNameError
from medlore.files import sha256_of
from medlore.models.segmenter.bundle import UnboundPairWarning, load_segmenter, write_segmenter_pack
from medlore.models.segmenter.checkpoints import read_segmenter, recognise
from medlore.models.segmenter.network import LORKD_NANO, LORKD_PRO, SAT_NANO, SAT_PRO, Segmenter, SegmenterConfig
from medlore.models.segmenter.prompts import PromptTable
from medlore.models.segmenter.vocabulary import REGIONS
from medlore.models.statefile import read_state

TINY_RANKS = (3, 2, 2, 1, 2, 2, 3, 1)
TINY_DEEP = SegmenterConfig.from_dict({**TINY.to_dict(), "deep_widths": [10]})


@pytest.fixture(scope="module")
def lorkd_state() -> dict[str, Tensor]:
    return filled(lorkd_shapes(TINY, TINY_RANKS))


@pytest.fixture(scope="module")
def lorkd_file(lorkd_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("lorkd") / "lorkd-imbalance-tiny.pth", lorkd_state)


@pytest.fixture(scope="module")
def sat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("sat") / "SAT_Tiny.pth", filled(sat_shapes(TINY_DEEP)))


@pytest.fixture
def table() -> PromptTable:
    return PromptTable(("ct/liver", "ct/heart", "mri/liver"), torch.randn(3, TINY.query_width), "a" * 64)


# --- the published key lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "shapes"),
    [
        ("sat_nano", sat_shapes(SAT_NANO)),
        ("sat_pro", sat_shapes(SAT_PRO)),
        ("lorkd_nano", lorkd_shapes(LORKD_NANO, LORKD_NANO_RANKS)),
        ("lorkd_pro", lorkd_shapes(LORKD_PRO, LORKD_PRO_RANKS)),
    ],
)
def test_the_files_of_these_tests_have_the_published_keys(file: str, shapes: dict[str, tuple[int, ...]], golden: Path) -> None:
    assert shapes == read_key_list(golden / f"lorkd_keys_{file}.txt")


@pytest.mark.parametrize(
    ("file", "name", "parameters", "ranks"),
    [
        ("sat_nano", "SAT-Nano", 110_277_568, ()),
        ("sat_pro", "SAT-Pro", 477_087_360, ()),
        ("lorkd_nano", "LoRKD-Nano", 67_315_458, LORKD_NANO_RANKS),
        ("lorkd_pro", "LoRKD-Pro", 127_861_884, LORKD_PRO_RANKS),
    ],
)
def test_every_published_file_is_recognised_by_its_keys(
    file: str, name: str, parameters: int, ranks: tuple[int, ...], golden: Path
) -> None:
    """On the true key lists, with weights that take no memory."""
    from medlore.models.segmenter.checkpoints import segmenter_weights

    shapes = read_key_list(golden / f"lorkd_keys_{file}.txt")
    weights = segmenter_weights({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()})
    assert weights.name == name
    assert weights.parameters() == parameters
    assert tuple(weights.rank_of(region) for region in weights.experts) == ranks
    if ranks:
        assert tuple(weights.experts) == REGIONS
        assert weights.form == "imbalanced"


@pytest.mark.parametrize(("config", "parameters"), [(LORKD_NANO, 67_010_016), (LORKD_PRO, 129_106_368)])
def test_balanced_models_have_the_published_sizes(config: SegmenterConfig, parameters: int) -> None:
    from medlore.models.segmenter.checkpoints import segmenter_weights

    weights = segmenter_weights({k: torch.zeros(1).expand(s) for k, s in lorkd_shapes(config, (8,) * 8).items()})
    assert weights.parameters() == parameters
    scalings = {rank: weights.experts["brain"].scaling[t] for t, rank in weights.experts["brain"].ranks(weights.base).items()}
    assert scalings == {8: 2.0, 16: 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_factors_that_are_not_finite_are_refused(value: float) -> None:
    from medlore.models.segmenter.checkpoints import canonical_name, segmenter_weights

    state = {k: torch.zeros(1).expand(s) for k, s in lorkd_shapes(LORKD_NANO, (8,) * 8).items()}
    broken = [next(k for k in state if k.endswith("mask_embed_proj.0.bias")), next(k for k in state if "lora_B_list" in k)]
    for name in broken:
        wrong = torch.full(tuple(state[name].shape), value)
        state |= {k: wrong for k in state if canonical_name(k) == canonical_name(name)}  # every copy of it
    with pytest.raises(CheckpointError, match=r"fits .* only in part: 2 not finite"):
        segmenter_weights(state)


# --- reading -----------------------------------------------------------------------------------------------------------


def test_sat_file_loads_whole_and_copies_are_dropped(sat_file: Path) -> None:
    bundle = load_segmenter(sat_file)
    assert bundle.config == TINY_DEEP
    assert bundle.regions == REGIONS
    assert bundle.ranks == {}
    assert bundle.network("brain") is bundle.network("abdomen") is bundle.network()
    assert set(bundle.weights.base) == set(Segmenter(TINY_DEEP).state_dict())


def test_lorkd_experts_are_merged_by_the_raw_view(lorkd_file: Path, lorkd_state: dict[str, Tensor]) -> None:
    bundle = load_segmenter(lorkd_file)
    assert bundle.ranks == dict(zip(REGIONS, TINY_RANKS, strict=True))
    layer = "backbone.decoder.stages.1.stages.0.conv"
    base, A, B = (lorkd_state[f"model.module.{layer}.{n}"] for n in ("conv.weight", "lora_A_list.6", "lora_B_list.6"))
    merged = bundle.network("thorax").state_dict()["backbone.decoder.stages.1.convs.0.conv.weight"]
    torch.testing.assert_close(merged, base + 2 * (B @ A).view(base.shape), rtol=0, atol=0)


def test_merging_changes_no_base_and_copies_no_more_than_it_must(lorkd_file: Path) -> None:
    bundle = load_segmenter(lorkd_file)
    before = {name: weight.clone() for name, weight in bundle.weights.base.items()}
    brain, base = bundle.network("brain"), bundle.network()
    assert bundle.network("brain") is brain
    assert brain.mask_embed_proj[0].weight.data_ptr() == base.mask_embed_proj[0].weight.data_ptr()
    brain.to(torch.float64)
    for name, weight in bundle.weights.base.items():
        assert torch.equal(weight, before[name])
    assert torch.equal(bundle.network("whole body").state_dict()["mask_embed_proj.0.weight"], before["mask_embed_proj.0.weight"])


def test_merged_networks_are_let_go_one_by_one(lorkd_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlore.models.segmenter.bundle._MERGED_BYTES", 1)
    bundle = load_segmenter(lorkd_file)
    first = bundle.network("brain")
    bundle.network("thorax")
    assert bundle.network("brain") is not first


def test_balanced_file_takes_alpha_and_says_so(tmp_path: Path) -> None:
    path = write_published(tmp_path / "balanced.pth", filled(lorkd_shapes(TINY, (2,) * 8)))
    bundle = load_segmenter(path)
    assert set(bundle.weights.experts["spine"].scaling.values()) == {8.0, 4.0}
    assert "alpha 16" in bundle.notes[0]
    other = load_segmenter(path, lora_alpha=4)
    assert set(other.weights.experts["spine"].scaling.values()) == {2.0, 1.0}


def test_alpha_is_refused_where_the_scaling_is_constant(lorkd_file: Path) -> None:
    with pytest.raises(InputError, match="constant scaling 2"):
        load_segmenter(lorkd_file, lora_alpha=4)


def test_files_are_read_without_prefix_wrapper_or_optimiser_too(tmp_path: Path, lorkd_state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    bare = {n.removeprefix("model.module."): w for n, w in lorkd_state.items() if not n.startswith("unet.")}
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save(bare, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("bare.safetensors", "old.pth"):
        assert load_segmenter(tmp_path / name).ranks == dict(zip(REGIONS, TINY_RANKS, strict=True))


def test_half_precision_files_become_float32(tmp_path: Path, lorkd_state: dict[str, Tensor]) -> None:
    path = write_published(tmp_path / "half.pth", {n: w.half() for n, w in lorkd_state.items()})
    weights = read_segmenter(path)
    assert {w.dtype for w in weights.base.values()} == {torch.float32}
    assert weights.merged("brain")["backbone.encoder.stages.0.0.convs.0.conv.weight"].dtype == torch.float32


def test_another_number_of_experts_gets_numbers_for_names(tmp_path: Path) -> None:
    path = write_published(tmp_path / "three.pth", filled(lorkd_shapes(TINY, (1, 2, 3))))
    assert load_segmenter(path).ranks == {"expert 0": 1, "expert 1": 2, "expert 2": 3}


# --- refusing ----------------------------------------------------------------------------------------------------------


def test_copies_that_differ_are_refused(tmp_path: Path, lorkd_state: dict[str, Tensor]) -> None:
    name = "unet.encoder.stages.0.0.stages.0.norm.bias"
    path = write_published(tmp_path / "twice.pth", {**lorkd_state, name: lorkd_state[name] + 1})
    with pytest.raises(CheckpointError, match="stored twice") as caught:
        load_segmenter(path)
    assert caught.value.faults == (f"{name} differs from its copy model.module.backbone.encoder.stages.0.0.stages.0.norm.bias",)


def test_a_file_that_fits_in_part_is_refused_with_one_report(tmp_path: Path, lorkd_state: dict[str, Tensor]) -> None:
    state = {n: w for n, w in lorkd_state.items() if "transformer_decoder.norm.bias" not in n}
    state["model.module.stray.weight"] = torch.zeros(2)
    state["model.module.mask_embed_proj.2.bias"] = torch.zeros(9)
    del state["unet.encoder.stages.0.0.stages.0.conv.lora_B_list.4"]
    del state["model.module.backbone.encoder.stages.0.0.stages.0.conv.lora_B_list.4"]
    layer = "backbone.decoder.stages.0.stages.0.conv.lora_A_list.2"
    del state[layer.replace("backbone", "unet")]
    state[f"model.module.{layer}"] = torch.zeros(4, 5)
    path = write_published(tmp_path / "part.pth", state)
    with pytest.raises(CheckpointError, match=r"part.pth.*2 missing, 1 unexpected, 2 misshapen") as caught:
        load_segmenter(path)
    report = "\n".join(caught.value.faults)
    for word in ("transformer_decoder.norm.bias (24,)", "stray.weight", "(9,), should be (4,)", "lora_B of expert 4", "lora_A of expert 2"):
        assert word in report


def test_a_missing_stage_is_reported_against_the_nearest_published_sizes(golden: Path) -> None:
    from medlore.models.segmenter.checkpoints import segmenter_weights

    shapes = read_key_list(golden / "lorkd_keys_sat_nano.txt")
    state = {k: torch.zeros(1).expand(s) for k, s in shapes.items() if ".encoder.stages.2." not in k}
    with pytest.raises(CheckpointError, match="fits SAT-Nano only in part: 8 missing"):
        segmenter_weights(state)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("module.backbone.swinViT.layers1.0.blocks.0.norm1.weight", "SwinUNETR"),
        ("module.backbone.encoder.mamba_layers.0.mamba.A_log", "UMamba"),
    ],
)
def test_other_backbones_are_refused_by_name(key: str, name: str, tmp_path: Path) -> None:
    path = write_published(tmp_path / "other.pth", {key: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=f"other.pth.*{name}"):
        load_segmenter(path)


def test_what_is_no_segmenter_is_named(tmp_path: Path) -> None:
    path = write_published(tmp_path / "vit.pth", {"blocks.0.attn.qkv.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="none of a SAT U-Net"):
        load_segmenter(path)
    assert recognise(["blocks.0.attn.qkv.weight"]) is None


class _Stranger:
    pass


@pytest.mark.parametrize("broken", ["truncated", "text", "pickle", "empty", "suffix"])
def test_broken_files_are_refused_with_a_reason(broken: str, tmp_path: Path, lorkd_file: Path) -> None:
    path = tmp_path / ("w.txt" if broken == "suffix" else "w.pth")
    if broken == "truncated":
        path.write_bytes(lorkd_file.read_bytes()[:5000])
    elif broken == "pickle":
        torch.save({"model_state_dict": {"a": torch.zeros(1)}, "args": _Stranger()}, path)
    elif broken == "empty":
        torch.save({"epoch": 3}, path)
    else:
        path.write_text("not weights")
    with pytest.raises(CheckpointError, match=r"w\.(pth|txt)"):
        read_state(path)


# --- packs -------------------------------------------------------------------------------------------------------------


def test_a_pack_is_the_file_that_it_was_made_of(lorkd_file: Path, tmp_path: Path, table: PromptTable) -> None:
    source = load_segmenter(lorkd_file)
    write_segmenter_pack(tmp_path / "pack", source.weights, prompts=table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle = load_segmenter(tmp_path / "pack")
    assert (bundle.config, bundle.ranks, bundle.name) == (source.config, source.ranks, source.name)
    assert bundle.modalities == ("ct", "mri")
    for region in (None, *REGIONS):
        theirs, ours = source.network(region).state_dict(), bundle.network(region).state_dict()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    torch.testing.assert_close(bundle.queries(["heart", "liver"], "CT"), table.embeddings[[1, 0]])
    with pytest.raises(UnknownNameError, match="'liver'"):
        bundle.queries(["livr"], "mr")


def test_one_merged_expert_needs_no_factors(lorkd_file: Path, tmp_path: Path) -> None:
    source = load_segmenter(lorkd_file)
    write_segmenter_pack(tmp_path / "abdomen", source.weights.only("abdomen"), region="abdomen")
    bundle = load_segmenter(tmp_path / "abdomen")
    assert bundle.regions == ("abdomen",)
    assert bundle.weights.parameters() == sum(w.numel() for w in source.weights.base.values())
    theirs, ours = source.network("abdomen").state_dict(), bundle.network("abdomen").state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    for other in ("brain", "whole body"):
        with pytest.raises(CheckpointError, match=f"no expert for '{other}'"):
            bundle.network(other)


def test_a_pack_without_one_expert_still_serves_the_others(lorkd_file: Path, tmp_path: Path) -> None:
    write_segmenter_pack(tmp_path / "pack", load_segmenter(lorkd_file).weights)
    (tmp_path / "pack/experts/head-and-neck.safetensors").unlink()
    bundle = load_segmenter(tmp_path / "pack")
    assert any("head and neck" in note for note in bundle.notes)
    assert bundle.network("brain") is not None
    assert "head and neck" not in bundle.ranks
    with pytest.raises(CheckpointError, match=r"no expert for 'head and neck' \(experts/head-and-neck.safetensors is missing\)"):
        bundle.network("head and neck")


def rewrite(pack: Path, name: str, change) -> None:
    """Change the tensors of one file of a pack, with its hash."""
    state = change(load_file(pack / name))
    save_file(state, pack / name)
    manifest = json.loads((pack / "manifest.json").read_text())
    manifest["files"][name] = sha256_of(pack / name)
    (pack / "manifest.json").write_text(json.dumps(manifest))


def test_a_pack_that_does_not_fit_its_sizes_is_refused_in_one_report(lorkd_file: Path, tmp_path: Path) -> None:
    pack = write_segmenter_pack(tmp_path / "pack", load_segmenter(lorkd_file).weights)

    def spoil(state: dict[str, Tensor]) -> dict[str, Tensor]:
        del state["mask_embed_proj.0.bias"]
        return {**state, "mask_embed_proj.2.bias": torch.zeros(3), "stranger": torch.zeros(1)}

    rewrite(pack, "base.safetensors", spoil)
    with pytest.raises(CheckpointError, match="1 missing, 1 unexpected, 1 misshapen") as caught:
        load_segmenter(pack)
    assert {fault.split(" (")[0] for fault in caught.value.faults} == {
        "missing: mask_embed_proj.0.bias", "unexpected: stranger", "misshapen: mask_embed_proj.2.bias",
    }  # fmt: skip


def test_an_expert_that_does_not_fit_spoils_only_its_region(lorkd_file: Path, tmp_path: Path) -> None:
    pack = write_segmenter_pack(tmp_path / "pack", load_segmenter(lorkd_file).weights)
    target = "backbone.encoder.stages.0.0.convs.0.conv"

    def spoil(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {name: tensor for name, tensor in state.items() if name != "backbone.encoder.stages.1.0.convs.0.conv.lora_B"}
        return {**state, f"{target}.lora_A": torch.zeros(2, 2)}

    rewrite(pack, "experts/brain.safetensors", spoil)
    bundle = load_segmenter(pack)
    bundle.network("spine")
    with pytest.raises(CheckpointError, match=r"1 missing, 1 misshapen"):
        bundle.network("brain")


def test_sizes_that_are_no_segmenter_are_refused(lorkd_file: Path, tmp_path: Path) -> None:
    pack = write_segmenter_pack(tmp_path / "pack", load_segmenter(lorkd_file).weights)
    manifest = json.loads((pack / "manifest.json").read_text())
    for change in ({"width": 3}, {"strides": [2, 2]}):
        (pack / "manifest.json").write_text(json.dumps({**manifest, "config": {**manifest["config"], **change}}))
        with pytest.raises(CheckpointError, match=r"manifest\.json: config"):
            load_segmenter(pack)


def test_a_pack_in_half_precision_is_used_in_full(lorkd_file: Path, tmp_path: Path, table: PromptTable) -> None:
    source = load_segmenter(lorkd_file)
    pack = write_segmenter_pack(tmp_path / "pack", source.weights, prompts=table)
    for name in json.loads((pack / "manifest.json").read_text())["files"]:
        rewrite(pack, name, lambda state: {key: tensor.half() for key, tensor in state.items()})
    bundle = load_segmenter(pack)
    network = bundle.network("brain").state_dict()
    assert {tensor.dtype for tensor in network.values()} == {torch.float32}
    assert bundle.queries(["liver"], "ct").dtype == torch.float32
    assert {a.dtype for a, _ in bundle.weights.experts["brain"].pairs.values()} == {torch.float32}
    for name, tensor in source.network("brain").state_dict().items():
        torch.testing.assert_close(network[name], tensor, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["base.safetensors", "experts/brain.safetensors"])
def test_a_changed_file_of_a_pack_is_refused(name: str, lorkd_file: Path, tmp_path: Path) -> None:
    write_segmenter_pack(tmp_path / "pack", load_segmenter(lorkd_file).weights)
    content = bytearray((tmp_path / "pack" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "pack" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="its hash differs"):
        load_segmenter(tmp_path / "pack").network("brain")


@pytest.mark.parametrize(("change", "said"), [
    ({"schema": "other/1"}, "schema 'other/1'"),
    ({"kind": "classifier"}, "a pack of a classifier"),
])  # fmt: skip
def test_packs_of_another_kind_are_refused(change: dict[str, str], said: str, lorkd_file: Path, tmp_path: Path) -> None:
    write_segmenter_pack(tmp_path / "pack", load_segmenter(lorkd_file).weights)
    manifest = json.loads((tmp_path / "pack/manifest.json").read_text())
    (tmp_path / "pack/manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(CheckpointError, match=said):
        load_segmenter(tmp_path / "pack")


def test_expert_choice_keeps_one(lorkd_file: Path) -> None:
    assert load_segmenter(lorkd_file, expert="pelvis").regions == ("pelvis",)
    with pytest.raises(UnknownNameError, match="pelvis"):
        load_segmenter(lorkd_file, expert="pelvs")


# --- prompts -----------------------------------------------------------------------------------------------------------


def test_a_pair_that_was_never_bound_is_warned_about(lorkd_file: Path, tmp_path: Path, table: PromptTable) -> None:
    table.write(tmp_path / "table.safetensors")
    with pytest.warns(UnboundPairWarning, match="never bound"):
        bundle = load_segmenter(lorkd_file, prompt_embeddings=tmp_path / "table.safetensors")
    write_segmenter_pack(tmp_path / "pack", bundle.weights, prompts=bundle.prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_segmenter(tmp_path / "pack")
        load_segmenter(tmp_path / "pack", prompt_embeddings=tmp_path / "table.safetensors")
    write_segmenter_pack(tmp_path / "nameless", bundle.weights, prompts=PromptTable(table.keys, table.embeddings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_segmenter(tmp_path / "nameless")
    with pytest.warns(UnboundPairWarning):
        load_segmenter(tmp_path / "nameless", prompt_embeddings=tmp_path / "table.safetensors")
    PromptTable(table.keys, table.embeddings, "b" * 64).write(tmp_path / "foreign.safetensors")
    with pytest.warns(UnboundPairWarning):
        load_segmenter(tmp_path / "pack", prompt_embeddings=tmp_path / "foreign.safetensors")


def test_prompts_of_another_width_are_refused(lorkd_file: Path, tmp_path: Path) -> None:
    PromptTable(("ct/liver",), torch.randn(1, 7)).write(tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match="width 7 for a network of query width 24"):
        load_segmenter(lorkd_file, prompt_embeddings=tmp_path / "narrow.safetensors")


def test_tables_are_read_in_three_forms(tmp_path: Path, table: PromptTable) -> None:
    import numpy as np
    from safetensors.torch import save_file

    table.write(tmp_path / "ours.safetensors")
    save_file(
        {k.replace("/", "_", 1): v.clone() for k, v in zip(table.keys, table.embeddings, strict=True)}, tmp_path / "named.safetensors"
    )
    np.savez(tmp_path / "arrays.npz", prompts=np.array(table.keys), embeddings=table.embeddings.numpy())
    for name in ("ours.safetensors", "named.safetensors", "arrays.npz"):
        read = PromptTable.read(tmp_path / name)
        torch.testing.assert_close(read.queries(["heart", "liver"], "ct"), table.embeddings[[1, 0]])
        assert read.labels("mri") == ["liver"]
    assert PromptTable.read(tmp_path / "ours.safetensors").text_sha256 == "a" * 64


def test_faulty_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        PromptTable(("ct/liver", "liver", "ct/liver"), torch.full((2, 4), float("nan")))
    assert len(caught.value.faults) == 4
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match=r"broken\.npz"):
        PromptTable.read(tmp_path / "broken.npz")


def test_a_bundle_without_prompts_says_what_to_give(lorkd_file: Path) -> None:
    with pytest.raises(InputError, match="no prompt embeddings"):
        load_segmenter(lorkd_file).queries(["liver"], "ct")
