"""Every family is one record in `FAMILIES`: the numbers of transformers itself, ranks, LoRA, input sizes, saved and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import medlore
from medlore.errors import InputError, UnknownNameError
from medlore.layers.surgery import blocks_of, without_head
from medlore.models.backbones.families import FAMILIES
from medlore.models.backbones.reading import Backbone, load_backbone

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
WIDE = {**SMALL, "intermediate_size": 64}
STAGES = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
CONVS = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 2, 1], "image_size": 32}


def _features_of_tokens(model: Any, prefix: int) -> Callable[[Tensor], Tensor]:
    def features(x: Tensor) -> Tensor:
        tokens = model(x).last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], 1)

    return features


def _mae_features(model: Any) -> Callable[[Tensor], Tensor]:
    """The encoder with nothing masked: its shuffle is undone by noise in ascending order."""

    def features(x: Tensor) -> Tensor:
        noise = torch.arange(16.0).expand(len(x), -1)
        model.config.mask_ratio = 0.0
        return model(x, noise=noise).last_hidden_state[:, 0]

    return features


# family -> what makes a small network as transformers saves it, and what its head's input is by transformers itself
NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[Any], Callable[[Tensor], Tensor]]]] = {
    "dinov2-registers": (
        lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)),
        lambda m: _features_of_tokens(m, 4),
    ),
    "dinov3": (lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**WIDE, num_register_tokens=3)), lambda m: _features_of_tokens(m, 4)),
    "siglip": (
        lambda: t.SiglipModel(t.SiglipConfig(vision_config=WIDE, text_config={"hidden_size": 32, "intermediate_size": 32,
                                             "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50})),
        lambda m: lambda x: m.vision_model(x).last_hidden_state.mean(1),
    ),
    "swinv2": (lambda: t.Swinv2Model(t.Swinv2Config(**STAGES)), lambda m: lambda x: m(x).pooler_output),
    "beit": (
        lambda: t.BeitModel(t.BeitConfig(**WIDE, use_relative_position_bias=True)), lambda m: lambda x: m(x).pooler_output,
    ),
    "deit": (lambda: t.DeiTModel(t.DeiTConfig(**WIDE), add_pooling_layer=False), lambda m: lambda x: m(x).last_hidden_state[:, 0]),
    "mae": (lambda: t.ViTMAEModel(t.ViTMAEConfig(**WIDE)), _mae_features),
    "convnext": (lambda: t.ConvNextModel(t.ConvNextConfig(**CONVS)), lambda m: lambda x: m(x).pooler_output),
    "convnextv2": (lambda: t.ConvNextV2Model(t.ConvNextV2Config(**CONVS)), lambda m: lambda x: m(x).pooler_output),
}  # fmt: skip
CONVOLUTIONAL = {"convnext", "convnextv2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and network of each family, with weights that are not tiny."""
    made = {}
    torch.manual_seed(3)
    for name, (make, _) in NETWORKS.items():
        network = make().eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(name)
        network.save_pretrained(folder)
        made[name] = (folder, network)
    return made


def features_of(backbone: Backbone, x: Tensor) -> Tensor:
    with torch.no_grad(), without_head(backbone.model, backbone.head_name) as model:
        return model(pixel_values=x).logits


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_transformers(saved: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, network = saved[name]
    side = 32 if name in CONVOLUTIONAL else 16
    found = load_backbone(folder, classes=4)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = NETWORKS[name][1](network)(x)
    assert found.family == name
    assert found.image_size == side
    assert (found.mean, found.std) == FAMILIES[name].statistics
    torch.testing.assert_close(features_of(found, x), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05
    assert found.head().weight.shape == (4, expected.shape[1])  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_are_planned_and_lora_attaches(saved: dict[str, tuple[Path, Any]], name: str) -> None:
    found = load_backbone(saved[name][0], classes=4)
    targets = "all-linear" if name in CONVOLUTIONAL else "attention"
    plan = medlore.plan_ranks(found.model, targets=targets)
    blocks = blocks_of(found.model)
    assert len(plan.layers) == (2 if name in CONVOLUTIONAL else 3) * len(blocks)  # q, v and output; or the two linear layers
    assert all(any(layer.name.startswith(f"{block}.") for block in blocks) for layer in plan.layers)
    folder_plan = medlore.plan_ranks(saved[name][0], targets=targets)  # the file, before any network is built
    if name != "siglip":  # its file has the pooling attention and the text tower besides
        assert [layer.rank for layer in folder_plan.layers] == [layer.rank for layer in plan.layers]
    tuned = medlore.get_peft_model(found.model, plan)
    tuned(pixel_values=torch.randn(2, 3, found.image_size, found.image_size)).logits.sum().backward()
    pairs = [p for n, p in tuned.named_parameters() if "lora_B" in n]
    assert len(pairs) == len(plan.layers)
    assert all(p.grad is not None and bool(p.grad.any()) for p in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_input_size_changes_where_positions_allow(saved: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, _ = saved[name]
    small = load_backbone(folder, classes=4)
    large = load_backbone(folder, classes=4, image_size=2 * small.image_size)
    assert large.image_size == 2 * small.image_size
    side = large.image_size
    assert features_of(large, torch.randn(1, 3, side, side)).isfinite().all()
    changed = {n for n, p in large.model.named_parameters() if p.shape != small.model.get_parameter(n).shape}
    tables = {"beit": "relative_position_bias_table"}.get(name, "position_embedding")
    expected = {"dinov2-registers": 1, "siglip": 1, "deit": 1, "mae": 1, "beit": 2}.get(name, 0)
    assert len(changed) == expected
    assert all(tables in n for n in changed)
    if name not in CONVOLUTIONAL | {"swinv2"}:
        with pytest.raises(InputError, match="a multiple of the patch size 4"):
            load_backbone(folder, classes=4, image_size=18)
    with pytest.raises(InputError, match="image_size"):
        load_backbone(folder, classes=4, image_size=1)


def test_positions_of_deit_keep_both_tokens(saved: dict[str, tuple[Path, Any]]) -> None:
    small, large = (load_backbone(saved["deit"][0], classes=2, image_size=side) for side in (None, 32))
    tables = [b.model.get_parameter("deit.embeddings.position_embeddings") for b in (small, large)]
    assert torch.equal(tables[0][0, :2], tables[1][0, :2])
    assert tables[1].shape[1] == 2 + 64


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network_comes_back(saved: dict[str, tuple[Path, Any]], tmp_path: Path, name: str) -> None:
    first = load_backbone(saved[name][0], classes=3, seed=5)
    first.model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    again = load_backbone(tmp_path / "again", classes=3, keep_head=True)
    x = torch.randn(1, 3, first.image_size, first.image_size)
    with torch.no_grad():
        torch.testing.assert_close(again.model(pixel_values=x).logits, first.model(pixel_values=x).logits)
    state = again.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in first.model.state_dict().items())


def test_siglip_vision_models_without_their_text_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = t.SiglipVisionModel(t.SiglipVisionConfig(**WIDE)).eval()
    network.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(features_of(load_backbone(tmp_path, classes=2), x), network(x).last_hidden_state.mean(1))


def test_a_type_without_a_record_names_its_neighbours(tmp_path: Path) -> None:
    t.ViTMSNModel(t.ViTMSNConfig(**WIDE)).save_pretrained(tmp_path)
    with pytest.raises(UnknownNameError, match=r"'vit_msn'.*ConvNeXt V2"):
        load_backbone(tmp_path, classes=2)
