"""Each method against its formula, written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.errors import InputError, StepError, TargetError
from medlore.layers.tuning import modules
from medlore.layers.tuning.adapters import ParallelAdapter, RepAdapter, SerialAdapter
from medlore.layers.tuning.anatomy import blocks_with_parts
from medlore.layers.tuning.attach import attach, attached, detach
from medlore.layers.tuning.factor_pairs import MaskedPair, MiniPairs, MixedPair, install_pairs
from medlore.layers.tuning.generalized import GeneralizedLora, install_generalized
from medlore.layers.tuning.methods import Request, install_method
from medlore.layers.tuning.modules import AddedModules, add_modules
from medlore.layers.tuning.options import AdapterSizes, TuningOptions
from medlore.layers.tuning.prompts import install_prompts
from medlore.layers.tuning.scale_shift import ScaleShift, thaw_norms
from medlore.ranks.allocate import plan_ranks

SIZES = AdapterSizes(4, 0.5, 0.0)


def stirred(module: nn.Module, seed: int = 3) -> Any:
    """The same module with no parameter at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return module.eval()


def tokens(width: int = 8) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))


def vit(**changes: Any) -> Any:
    import transformers

    torch.manual_seed(5)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4}
    return stirred(transformers.ViTForImageClassification(transformers.ViTConfig(**{**sizes, **changes})))


def swin(**changes: Any) -> Any:
    import transformers

    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    return stirred(transformers.SwinForImageClassification(transformers.SwinConfig(**{**sizes, **changes})))


def test_houlsby_stands_behind_adaptformer_beside() -> None:
    layer, x = stirred(nn.Linear(6, 8)), tokens(6)
    y = layer(x)
    for kind, source, act, width in ((SerialAdapter, y, F.gelu, 8), (ParallelAdapter, x, F.relu, 6)):
        base = stirred(nn.Linear(6, 8)) if kind is SerialAdapter else stirred(nn.Linear(6, 6))
        start = base(x)
        extra = stirred(kind(width, SIZES), seed=7)
        attach(base, extra)
        from_where = source if kind is SerialAdapter else x
        assert torch.allclose(base(x), start + 0.5 * extra.up(act(extra.down(from_where))), atol=1e-6)
        detach(base)
        assert torch.equal(base(x), start)


def test_adapters_drop_inner_activations_only_while_training() -> None:
    for kind in (SerialAdapter, ParallelAdapter, RepAdapter):
        base = nn.Identity()
        attach(base, stirred(kind(8, AdapterSizes(4, 1.0, 0.5))))
        assert torch.equal(base.eval()(tokens()), base(tokens()))
        assert not torch.equal(base.train()(tokens()), base(tokens()))


def test_repadapter_is_grouped_and_goes_into_what_reads_the_norm() -> None:
    norm, reader, x = stirred(nn.LayerNorm(8)), stirred(nn.Linear(8, 3, bias=False)), tokens()
    extra = stirred(RepAdapter(8, SIZES))
    grouped = nn.Conv1d(4, 8, 1, groups=2)
    with torch.no_grad():
        grouped.weight.copy_(extra.up.flatten(0, 1)[:, :, None])
        grouped.bias.copy_(extra.up_bias)  # type: ignore[union-attr]
    y = norm(x)
    by_hand = y + 0.5 * grouped(extra.down(y).transpose(1, 2)).transpose(1, 2)
    attach(norm, extra)
    assert torch.allclose(norm(x), by_hand, atol=1e-6)
    expected = reader(norm(x))
    extra.fold_into([reader])
    detach(norm)
    assert torch.allclose(reader(norm(x)), expected, atol=1e-5)
    assert reader.bias is not None


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Linear(8, 6, bias=False), nn.LayerNorm(8)])
def test_scale_and_shift_go_into_the_layer(layer: nn.Module) -> None:
    base = stirred(layer)
    y = base(tokens())
    extra = stirred(ScaleShift(y.shape[-1], channels_first=False))
    attach(base, extra)
    expected = extra.scale * y + extra.shift
    assert torch.allclose(base(tokens()), expected, atol=1e-6)
    extra.fold(base)
    detach(base)
    assert torch.allclose(base(tokens()), expected, atol=1e-5)


def test_scale_and_shift_go_into_a_convolution() -> None:
    base = stirred(nn.Conv2d(3, 4, 2, stride=2, bias=False))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    extra = stirred(ScaleShift(4, channels_first=True))
    expected = base(x) * extra.scale[None, :, None, None] + extra.shift[None, :, None, None]
    attach(base, extra)
    assert torch.allclose(base(x), expected, atol=1e-6)
    extra.fold(base)
    detach(base)
    assert torch.allclose(base(x), expected, atol=1e-5)


def test_glora_changes_weight_and_bias_as_its_equation_says() -> None:
    layer, x = stirred(nn.Linear(8, 6)), tokens()
    extra = stirred(GeneralizedLora(layer, 2, ("lora", "lora", "lora", "vector", "vector")))
    (a1, a2), (b1, b2), (c1, c2), (d,), (e,) = (list(extra.supports[n].factors) for n in "ABCDE")
    weight = layer.weight + layer.weight * (a1 @ a2) + b1 @ b2
    bias = layer.bias + (layer.weight @ (c1 @ c2)).flatten() + d.flatten() * layer.bias + e.flatten()
    expected = F.linear(x, weight, bias)
    attach(layer, extra)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_glora_in_its_smaller_forms() -> None:
    layer, x = stirred(nn.Linear(8, 6, bias=False)), tokens()
    extra = stirred(GeneralizedLora(layer, 2, ("vector", "scalar", "vector", "vector", "scalar")))
    assert "D" not in extra.supports  # there is no bias to scale
    a, b, c, e = (extra.supports[n].factors[0] for n in "ABCE")
    assert (a.shape, b.shape, c.shape, e.shape) == ((6, 1), (1, 1), (8, 1), (1, 1))
    expected = F.linear(x, layer.weight * (1 + a) + b, (layer.weight @ c).flatten() + e.flatten())
    attach(layer, extra)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    extra.fold(layer)
    detach(layer)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_melora_is_block_diagonal() -> None:
    layer, x = stirred(nn.Linear(8, 6)), tokens()
    extra = stirred(MiniPairs(layer, 4, 1.5, 0.0, TuningOptions(mini_loras=2)))
    shares = x.chunk(2, dim=-1)
    parts = [s @ A.T @ B.T for s, A, B in zip(shares, extra.lora_A, extra.lora_B, strict=True)]
    expected = layer(x) + 1.5 * torch.cat(parts, dim=-1)
    attach(layer, extra)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    product = extra.pair().B @ extra.pair().A
    assert not product[:3, 4:].any()
    assert not product[3:, :4].any()
    assert torch.linalg.matrix_rank(product) == 4


def test_moslora_mixes_subspaces_and_starts_orthogonal() -> None:
    layer = nn.Linear(8, 6)
    mixer = MixedPair(layer, 4, 1.0, 0.0, TuningOptions()).mixer
    assert torch.allclose(mixer @ mixer.T, torch.eye(4), atol=1e-5)
    extra = stirred(MixedPair(layer, 4, 2.0, 0.0, TuningOptions()))
    expected = layer(tokens()) + 2 * tokens() @ extra.lora_A.T @ extra.mixer.T @ extra.lora_B.T
    attach(layer, extra)
    assert torch.allclose(layer(tokens()), expected, atol=1e-5)


def test_capaboost_has_the_rank_of_all_its_copies() -> None:
    layer = nn.Linear(16, 16)
    torch.manual_seed(0)
    extra = stirred(MaskedPair(layer, 3, 1.0, 0.0, TuningOptions()))
    copies = [(extra.lora_B * n) @ (extra.lora_A * m) for m, n in zip(extra.masks_in, extra.masks_out, strict=True)]
    product = extra.pair().B @ extra.pair().A
    assert torch.allclose(product, copies[0] + copies[1], atol=1e-5)
    assert torch.linalg.matrix_rank(product) == 6
    assert sum(p.numel() for p in extra.parameters()) == 3 * 32
    assert 0.3 < extra.masks_in.float().mean() < 0.7
    torch.manual_seed(0)
    assert torch.equal(MaskedPair(layer, 3, 1.0, 0.0, TuningOptions()).masks_in, extra.masks_in)


# ---- Prompts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_are_tokens_of_a_vit(*, deep: bool) -> None:
    model = vit()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    hidden = model.vit.embeddings(x)
    plain = vit()
    install_prompts(model, TuningOptions(prompt_length=3), deep=deep)
    prompts = [extra.prompts for _, _, extra in attached(model) if getattr(extra, "prompts", None) is not None]
    assert len(prompts) == (2 if deep else 1)
    hidden = torch.cat([hidden[:, :1], prompts[0].expand(2, -1, -1), hidden[:, 1:]], dim=1)  # where the paper puts them
    for i, block in enumerate(plain.vit.layers):
        if deep and i:
            hidden = torch.cat([hidden[:, :1], prompts[i].expand(2, -1, -1), hidden[:, 4:]], dim=1)
        hidden = block(hidden)
    expected = plain.classifier(plain.vit.layernorm(hidden)[:, 0])
    assert torch.allclose(model(pixel_values=x).logits, expected, atol=1e-5)


def window_attention(block: Any, x: Tensor, prompts: Tensor, *, side: int = 4) -> tuple[Tensor, Tensor]:
    """Image tokens (b n d) in unshifted windows of side 4 and prompts (b p d), by hand; the answers to both."""
    attention, p = block.attention, prompts.shape[1]
    cut = x.unflatten(1, (side // 4, 4, side // 4, 4)).transpose(2, 3)  # b y 4 x 4 d -> b y x 4 4 d
    windows = cut.flatten(3, 4).flatten(1, 2)  # b w s d
    count = windows.shape[1]
    both = block.layernorm_before(torch.cat([prompts[:, None].expand(-1, count, -1, -1), windows], dim=2)).flatten(0, 1)
    bias = F.pad(attention.relative_position_bias(), (p, 0, p, 0))
    heads = [
        proj(both).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    answer = attention.o_proj(F.scaled_dot_product_attention(*heads, attn_mask=bias).transpose(1, 2).flatten(2))
    answer = answer.unflatten(0, (-1, count))  # b w p+s d
    image = answer[:, :, p:].unflatten(2, (4, 4)).unflatten(1, (side // 4, side // 4)).transpose(2, 3)
    return image.reshape(x.shape), answer[:, :, :p].mean(dim=1)


def test_prompts_join_the_window_of_a_swin() -> None:
    sizes = {"image_size": 8, "depths": [1], "num_heads": [2]}
    model, plain = swin(**sizes), swin(**sizes)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    hidden, _ = plain.swin.embeddings(x)
    install_prompts(model, TuningOptions(prompt_length=3), deep=True)
    (prompts,) = (extra.prompts for _, _, extra in attached(model) if getattr(extra, "prompts", None) is not None)
    block = plain.swin.encoder.layers[0].blocks[0]
    hidden = hidden + window_attention(block, hidden, prompts.expand(2, -1, -1))[0]
    hidden = hidden + block.mlp(block.layernorm_after(hidden))
    expected = plain.classifier(plain.swin.layernorm(hidden).mean(dim=1))
    assert torch.allclose(model(pixel_values=x).logits, expected, atol=1e-4)


def test_shallow_prompts_walk_through_a_swin() -> None:
    """Four windows (prompts averaged), MLP, merging (channels four times), one window."""
    model, plain = swin(depths=[1, 1]), swin(depths=[1, 1])
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    hidden, size = plain.swin.embeddings(x)
    install_prompts(model, TuningOptions(prompt_length=3), deep=False)
    (prompt,) = (extra.prompts for _, _, extra in attached(model) if getattr(extra, "prompts", None) is not None)
    prompts = prompt.expand(2, -1, -1)
    first, second = (stage.blocks[0] for stage in plain.swin.encoder.layers)
    image, own = window_attention(first, hidden, prompts, side=8)
    hidden, prompts = (t + first.mlp(first.layernorm_after(t)) for t in (hidden + image, prompts + own))
    merging = plain.swin.encoder.layers[0].downsample
    hidden, prompts = merging(hidden, size), merging.reduction(merging.norm(prompts.repeat(1, 1, 4)))
    hidden = hidden + window_attention(second, hidden, prompts)[0]
    hidden = hidden + second.mlp(second.layernorm_after(hidden))
    expected = plain.classifier(plain.swin.layernorm(hidden).mean(dim=1))
    assert torch.allclose(model(pixel_values=x).logits, expected, atol=1e-4)


def test_prompts_see_every_window_and_average_over_them() -> None:
    """Shifted windows with their mask, several windows an image: images of a batch do not mix."""
    model = swin()
    install_prompts(model, TuningOptions(prompt_length=2), deep=False)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    together = model(pixel_values=x).logits
    alone = torch.cat([model(pixel_values=image[None]).logits for image in x])
    assert torch.allclose(together, alone, atol=1e-5)


# ---- What cannot be done is said ------------------------------------------------------------------------------------------------


def test_networks_that_do_not_fit_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for kind in modules._BUILD:
        if kind != "glora":
            with pytest.raises(TargetError, match="--method"):
                add_modules(plain, AddedModules(kind), "head")
    with pytest.raises(TargetError, match="without layer norms"):
        thaw_norms(plain)
    with pytest.raises(TargetError, match="1 targets") as caught:
        install_generalized(plain, TuningOptions(), {"0": 2, "1": 2})
    assert "1: ReLU" in str(caught.value)
    fused = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})})
    with pytest.raises(TargetError, match="q, k and v apart") as caught:
        install_pairs(fused, "moslora", plan_ranks(fused, rule="uniform:2"), dropout=0.0, options=TuningOptions())
    assert "attn.qkv[q]: Linear" in str(caught.value)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="bottleneck: 3 at width 8"):
        RepAdapter(8, AdapterSizes(3, 1.0, 0.0))
    with pytest.raises(InputError, match="bottleneck: got 0"):
        SerialAdapter(8, AdapterSizes(0, 1.0, 0.0))
    with pytest.raises(InputError, match="mini_loras: 3 for rank 4"):
        MiniPairs(nn.Linear(8, 8), 4, 1.0, 0.0, TuningOptions(mini_loras=3))
    with pytest.raises(InputError, match="mask_density"):
        MaskedPair(nn.Linear(8, 8), 4, 1.0, 0.0, TuningOptions(mask_density=0.0))
    with pytest.raises(InputError, match="prompt_length: got 0"):
        install_prompts(vit(), TuningOptions(prompt_length=0), deep=True)
    with pytest.raises(InputError, match="five words") as caught:
        install_generalized(nn.Linear(2, 2), TuningOptions(glora_path="lora,nose,scalar,lora"), {"": 1})
    assert "4 words" in str(caught.value)
    assert "B: 'nose'" in str(caught.value)
    assert "C: 'scalar'" in str(caught.value)


def test_a_network_is_tuned_once() -> None:
    model = vit()
    add_modules(model, AddedModules("ssf"), "classifier")
    with pytest.raises(TargetError, match="tuned already"):
        add_modules(model, AddedModules("repadapter"), "classifier")


def test_parts_of_blocks_are_found_in_every_family() -> None:
    import transformers as t

    dino = t.Dinov2ForImageClassification(
        t.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, use_swiglu_ffn=True)
    )
    (block,) = blocks_with_parts(dino, "test")
    assert [n.rsplit(".", 1)[-1] for n in (*block.mlp_inputs, block.mlp_output)] == ["gate_proj", "up_proj", "down_proj"]
    assert [n.rsplit(".", 1)[-1] for n in block.norms] == ["norm1", "norm2"]
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4}
    (block,) = blocks_with_parts(t.CLIPForImageClassification(t.CLIPConfig(vision_config=vision)), "test")
    assert block.mlp == "vision_model.encoder.layers.0.mlp"
    assert block.projections == tuple(f"{block.attention}.{n}_proj" for n in "qkv")
    assert [b.width for b in blocks_with_parts(swin(), "test")] == [8, 8, 16]


@pytest.mark.parametrize("kind", [k for k in modules._BUILD if k != "glora"])
def test_dinov2_and_clip_take_every_kind(kind: Any) -> None:
    import transformers as t

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    dino = t.Dinov2ForImageClassification(t.Dinov2Config(**sizes))
    clip = t.CLIPForImageClassification(t.CLIPConfig(vision_config={**sizes, "intermediate_size": 12}))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for model in (stirred(dino), stirred(clip)):
        before = model(pixel_values=x).logits
        add_modules(model, AddedModules(kind), "classifier")
        assert torch.equal(model(pixel_values=x).logits, before) != kind.startswith("vpt")


def test_repadapter_goes_into_windows_that_are_filled_up() -> None:
    import transformers

    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=7, num_labels=3
    )
    torch.manual_seed(0)
    model, x = transformers.SwinForImageClassification(config).eval(), torch.randn(2, 3, 64, 64)
    tuning = install_method("repadapter", model, Request(head="classifier", sample=x))
    for name, parameter in model.named_parameters():
        if ".tuning." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        before = model.eval()(pixel_values=x).logits
        after = tuning.merged().eval()(pixel_values=x).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_a_shift_behind_a_singular_adapter_is_not_put_before_it() -> None:
    """M = -1 takes every direction away: what reads zeros in the windows' rim can then not be told from what the adapter answers."""
    sizes = AdapterSizes(8, 1.0, 0.0)
    norm, reader, extra = stirred(nn.LayerNorm(8)), stirred(nn.Linear(8, 3)), RepAdapter(8, sizes)
    with torch.no_grad():
        extra.down.weight.copy_(-(1 - 1e-6) * torch.eye(8))
        extra.down.weight[0] = 0  # one direction of eight stays: the largest singular value is 1, the smallest 1e-6
        extra.up.copy_(torch.eye(4).expand(2, 4, 4))
        extra.up_bias.fill_(1.0)
    before = [reader.weight.clone(), reader.bias.clone(), norm.bias.clone()]
    with pytest.raises(StepError, match=r"merging a RepAdapter: I \+ M has singular values from 1\.\de-06"):
        extra.fold_into([reader], norm=norm)
    assert all(torch.equal(a, b) for a, b in zip(before, [reader.weight, reader.bias, norm.bias], strict=True)), "nothing was changed"
    extra.fold_into([reader])  # without zeros between norm and reader no inverse is needed
