"""Backbones: every family loads, foreign files give the numbers of an independent forward, broken ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import timm_restated as restated
from medlore.errors import CheckpointError, InputError, MedloreError, UnknownNameError
from medlore.layers.surgery import without_head
from medlore.models.backbones.image_size import resize_positions
from medlore.models.backbones.keymaps import convert_state_dict
from medlore.models.backbones.reading import load_backbone

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def small_networks() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SMALL, intermediate_size=64, num_labels=3)),
        "dinov2": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**SMALL, num_labels=3)),
        "swin": lambda: t.SwinForImageClassification(
            t.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=3)
        ),
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL, intermediate_size=64)),
        "resnet": lambda: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
        ),
    }


FAMILIES = ("vit", "dinov2", "swin", "clip", "resnet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(1)
    for name, make in small_networks().items():
        make().save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_load_with_a_fresh_seeded_head(folders: dict[str, Path], family: str) -> None:
    side = 32 if family == "resnet" else 16
    first, again, other = (load_backbone(folders[family], classes=5, seed=seed) for seed in (0, 0, 1))
    x = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        logits = first.model(pixel_values=x).logits
        assert logits.shape == (2, 5)
        assert torch.equal(logits, again.model(pixel_values=x).logits)
        assert not torch.equal(logits, other.model(pixel_values=x).logits)
    assert first.family == family
    assert torch.count_nonzero(first.head().bias) == 0
    assert first.statistics_from.startswith("published")
    assert first.sha256 == again.sha256
    assert not first.model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_network_comes_back_with_its_head(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    side = 32 if family == "resnet" else 16
    saved = load_backbone(folders[family], classes=2, seed=3)
    saved.model.save_pretrained(tmp_path / "saved")
    back = load_backbone(tmp_path / "saved", classes=2, keep_head=True)
    x = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        assert torch.equal(back.model(pixel_values=x).logits, saved.model(pixel_values=x).logits)


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin", "clip"])
def test_input_size_changes_only_what_depends_on_it(folders: dict[str, Path], family: str) -> None:
    small, large = load_backbone(folders[family], classes=2), load_backbone(folders[family], classes=2, image_size=32)
    with torch.inference_mode():
        assert large.model(pixel_values=torch.randn(1, 3, 32, 32)).logits.shape == (1, 2)
    after = large.model.state_dict()
    changed = (
        [k for k, v in small.model.state_dict().items() if not torch.equal(v, after[k])]
        if family == "swin"
        else [k for k, v in small.model.state_dict().items() if v.shape != after[k].shape]
    )
    assert all("position" in name for name in changed)
    assert bool(changed) == (family != "swin")
    assert any("32" in note for note in large.notes)


def test_statistics_come_from_the_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(folders["vit"], tmp_path / "vit"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4], "resample": 2}))
    loaded = load_backbone(folder, classes=2)
    assert loaded.mean == (0.1, 0.2, 0.3)
    assert loaded.std == (0.4, 0.4, 0.4)
    assert loaded.interpolation == "bilinear"
    assert loaded.statistics_from == "checkpoint"
    assert loaded.notes == ()
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2], "image_std": [1]}))
    with pytest.raises(CheckpointError, match="three numbers"):
        load_backbone(folder, classes=2)


def test_statistics_that_are_assumed_are_reported_with_the_way_to_change_them(tmp_path: Path) -> None:
    save_file(restated.random_vit("timm"), tmp_path / "deit.safetensors")
    assumed = load_backbone(tmp_path / "deit.safetensors", classes=2)
    assert assumed.statistics_from == "published statistics of vit"
    note = next(n for n in assumed.notes if "normalised" in n)
    assert "published statistics of vit assumed (mean 0.5 0.5 0.5; std 0.5 0.5 0.5)" in note
    assert "--mean and --std" in note
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    stated = load_backbone(tmp_path / "deit.safetensors", classes=2, mean=mean, std=std)
    assert (stated.mean, stated.std, stated.statistics_from) == (mean, std, "settings")
    assert not any("normalised" in n for n in stated.notes)
    with pytest.raises(InputError, match="one without the other"):
        load_backbone(tmp_path / "deit.safetensors", classes=2, mean=mean)


def test_forms_that_only_ranks_reads_say_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "ViT-B_16.npz", **{"embedding/kernel": np.ones((4, 4, 3, 8), np.float32)})
    with pytest.raises(CheckpointError, match=r"a JAX \.npz file.*transformers folder.*`medlore ranks` reads more forms"):
        load_backbone(tmp_path / "ViT-B_16.npz", classes=2)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"a file of type '\.txt'"):
        load_backbone(tmp_path / "notes.txt", classes=2)
    save_file({"visual.transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8)}, tmp_path / "open_clip.safetensors")
    with pytest.raises(CheckpointError, match=r"the naming of open_clip.*`medlore ranks` reads this file"):
        load_backbone(tmp_path / "open_clip.safetensors", classes=2)


@pytest.mark.parametrize("scheme", ["timm", "mmpretrain"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_vit_file_equals_the_restated_forward(tmp_path: Path, scheme: str, suffix: str) -> None:
    weights = restated.random_vit(scheme)
    file = tmp_path / f"vit{suffix}"
    if suffix == ".pth":
        prefix = "backbone." if scheme == "mmpretrain" else "module."
        wrapped = {f"{prefix}{k}": v for k, v in weights.items()} | {"head.layers.head.weight": torch.zeros(7, 64)}
        torch.save({"state_dict": wrapped, "meta": {"epoch": 3}}, file)
    else:
        save_file(weights, file)
    loaded = load_backbone(file, classes=3, heads=2)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode(), without_head(loaded.model, loaded.head_name) as body:
        ours = body(pixel_values=x).logits
        theirs = restated.vit_features(weights, x, heads=2, scheme=scheme)[:, 0]
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert (ours - theirs.roll(1, 0)).abs().max() > 0.1


def test_dinov2_file_equals_the_restated_forward(tmp_path: Path) -> None:
    weights = restated.random_vit("timm", scale=True)
    save_file(weights | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dino.safetensors")
    loaded = load_backbone(tmp_path / "dino.safetensors", classes=3)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode(), without_head(loaded.model, loaded.head_name) as body:
        ours = body(pixel_values=x).logits
        tokens = restated.vit_features(weights, x, heads=1, scheme="timm")
    assert loaded.family == "dinov2"
    assert "1 attention heads assumed" in " ".join(loaded.notes)
    assert torch.allclose(ours, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1), atol=2e-5)


@pytest.mark.parametrize("scheme", ["timm", "original", "mmpretrain"])
def test_swin_file_equals_the_restated_forward(tmp_path: Path, scheme: str) -> None:
    weights = restated.random_swin(scheme)
    torch.save(weights, tmp_path / "swin.pth")
    loaded = load_backbone(tmp_path / "swin.pth", classes=3)
    assert loaded.image_size == 16
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode(), without_head(loaded.model, loaded.head_name) as body:
        ours = body(pixel_values=x).logits
        theirs = restated.swin_features(weights, x, depths=[2, 2], heads=[2, 4], window=4, scheme=scheme)
    assert torch.allclose(ours, theirs, atol=2e-5)


def test_swin_position_index_is_checked() -> None:
    weights = restated.random_swin("timm")
    index = torch.arange(256).reshape(16, 16)
    with pytest.raises(CheckpointError, match="another order of relative positions"):
        convert_state_dict(weights | {"layers.0.blocks.0.attn.relative_position_index": index}, where="x.pth")


def test_positions_without_a_class_token_get_a_zero_for_it() -> None:
    weights = restated.random_vit("timm")
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    table = convert_state_dict(weights, where="x.pth").weights["vit.embeddings.position_embeddings"]
    assert table.shape == (1, 17, 64)
    assert not table[0, 0].any()
    assert torch.equal(table[:, 1:], weights["pos_embed"])


def test_positions_are_resampled_once_and_keep_the_class_token() -> None:
    table = torch.randn(1, 1 + 24 * 24, 8)
    small = resize_positions(table, 14 * 14)
    assert torch.equal(small[:, 0], table[:, 0])
    assert torch.equal(resize_positions(table, 24 * 24), table)
    ramp = torch.linspace(0, 1, 24).repeat(24)[:, None]  # n 1, rising along the columns
    down = resize_positions(ramp, 12 * 12, prefix=0).reshape(12, 12)
    inner = (torch.arange(12) * 2 + 0.5)[1:-1] / 23
    assert torch.allclose(down[5, 1:-1], inner, atol=2e-3)
    flat = resize_positions(torch.full((5, 3), 2.0), 49)
    assert torch.allclose(flat, torch.full((50, 3), 2.0), atol=1e-5)


def broken_files() -> dict[str, tuple[Callable[[Path], None], str]]:
    def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
        def write(file: Path) -> None:
            weights = restated.random_vit("timm")
            change(weights)
            save_file(weights, file)

        return write

    def truncated(file: Path) -> None:
        save_file(restated.random_vit("timm"), file)
        file.write_bytes(file.read_bytes()[:-1000])

    return {
        "truncated": (truncated, "not a whole safetensors file"),
        "text": (lambda f: f.write_text("hello") and None, "not a whole safetensors file"),
        "unknown key": (with_weights(lambda w: w.update({"blocks.0.attn.q_norm.weight": torch.ones(64)})), "q_norm"),
        "missing key": (with_weights(lambda w: w.pop("blocks.1.attn.proj.bias")), "missing: vit.layers.1.attention.o_proj.bias"),
        "nan": (with_weights(lambda w: w["blocks.1.mlp.fc1.weight"].fill_(float("nan"))), "mlp.fc1.weight: holds values"),
        "zero": (with_weights(lambda w: w["blocks.1.mlp.fc1.weight"].zero_()), "mlp.fc1.weight: all zero"),
        "unknown naming": (lambda f: save_file({"a": torch.ones(2)}, f), "unknown naming"),
    }


@pytest.mark.parametrize("case", list(broken_files()))
def test_broken_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    write, message = broken_files()[case]
    write(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_backbone(tmp_path / "weights.safetensors", classes=2)
    assert "weights.safetensors" in str(caught.value)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"state_dict": Trap()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"trap\.pth: a pickle that would run code"):
        load_backbone(tmp_path / "trap.pth", classes=2)
    assert not (tmp_path / "executed").exists()


def wrong_uses(folders: dict[str, Path], empty: Path) -> dict[str, tuple[dict[str, Any], type[MedloreError], str]]:
    return {
        "no such": ({"source": "no/such/model"}, InputError, "no such file or folder.*OWNER/NAME of a hub"),
        "a misspelt file": ({"source": "no/model.safetensors"}, InputError, "no such file or folder"),
        "not on the hub": ({"source": "no/such"}, InputError, "no file, no folder, and could not be fetched"),
        "empty folder": ({"source": empty}, InputError, "without config.json"),
        "asset": ({"source": "medlore:vit-maxi"}, UnknownNameError, "vit-maxi"),
        "classes": ({"source": folders["vit"], "classes": 0}, InputError, "classes"),
        "size": ({"source": folders["vit"], "image_size": 18}, InputError, "multiple of the patch size 4"),
        "swin size": ({"source": folders["swin"], "image_size": 8}, InputError, "at least 16 for this Swin"),
        "head": ({"source": folders["vit"], "keep_head": True}, CheckpointError, "a head of 3 outputs"),
        "no head": ({"source": folders["clip"], "keep_head": True}, CheckpointError, "missing: classifier"),
    }


@pytest.mark.parametrize(
    "case", ["no such", "a misspelt file", "not on the hub", "empty folder", "asset", "classes", "size", "swin size", "head", "no head"]
)
def test_wrong_use(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    arguments, kind, message = wrong_uses(folders, tmp_path)[case]
    with pytest.raises(kind, match=message):
        load_backbone(**{"classes": 2, **arguments})


def test_incomplete_folder_is_refused_with_a_list(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    folder = Path(shutil.copytree(folders["vit"], tmp_path / "vit"))
    weights = load_file(folder / "model.safetensors")
    lost = "vit.layernorm.weight"
    save_file({k: v for k, v in weights.items() if k != lost} | {"surprise": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="2 tensors do not fit") as caught:
        load_backbone(folder, classes=2)
    assert "left over: surprise" in str(caught.value)
    assert "missing: " in str(caught.value)


def test_a_part_of_a_network_is_named_as_such() -> None:
    with pytest.raises(CheckpointError, match=r"without 'vit\.embeddings\.patch_embeddings\.projection\.weight'"):
        convert_state_dict({"blocks.0.attn.qkv.weight": torch.zeros(3, 4)}, where="half.pth")
