"""What every tuning method promises on every family of networks: start, save, merge, resume. Pairwise; the whole product is `full`."""

from __future__ import annotations

import copy
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medlore.layers.surgery import blocks_of, load_trainable_state, trainable_state
from medlore.layers.tuning.attach import attached
from medlore.layers.tuning.methods import METHODS, Request, Tuning, install_method
from medlore.layers.tuning.options import TuningOptions
from medlore.models.backbones.reading import Backbone, load_backbone
from medlore.ranks.allocate import plan_ranks
from medlore.ranks.targets import find_targets
from medlore.tuning.tuned import load_tuned, save_tuned

STEPS = 4
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS} | {
    "sr-lora nested": ("sr-lora", {"partial_update": "nested"}),
    "sr-lora shapley": ("sr-lora", {"component_masks": "shapley"}),
    "melora of 4": ("melora", {"options": TuningOptions(mini_loras=4)}),
    "glora of vectors": ("glora", {"options": TuningOptions(glora_path="vector,scalar,none,scalar,none")}),
}
FAMILIES = ("vit", "swin")
PROMPTS = ("vpt-shallow", "vpt-deep")  # by definition they change the output at once
STAYS = ("adapter", "adaptformer", *PROMPTS)  # not merged: they keep acting beside the network


def cases(aspect: str) -> list[Any]:
    """Each method with one family in every aspect and with both over all; the other half is for `full`."""
    aspects = ("start", "save", "merge", "resume")
    made = []
    for i, variant in enumerate(VARIANTS):
        for j, family in enumerate(FAMILIES):
            chosen = (i + aspects.index(aspect)) % len(FAMILIES) == j
            made.append(pytest.param(variant, family, marks=() if chosen else pytest.mark.full, id=f"{variant}-{family}"))
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers as t

    made = {}
    configs: dict[str, tuple[Any, Any]] = {
        "vit": (
            t.ViTForImageClassification,
            t.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4),
        ),
        "swin": (
            t.SwinForImageClassification,
            t.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0),
        ),
    }
    for family, (kind, config) in configs.items():
        torch.manual_seed(5)
        model = kind(config)
        for parameter in model.parameters():  # the small default initialisation would hide differences
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
        made[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(made[family])
    return made


@lru_cache(maxsize=4)
def read(folder: Path) -> Backbone:
    return load_backbone(folder, classes=3)


def backbone(folder: Path) -> Backbone:
    """A fresh one; its file is read once."""
    return copy.deepcopy(read(folder))


def images(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def installed(variant: str, base: Backbone) -> Tuning:
    name, changes = VARIANTS[variant]
    rule = METHODS[name].rule
    plan = None if rule is None else plan_ranks(base.model, rule="uniform:4", alpha="rslora" if name == "rslora" else "rank")
    options = TuningOptions(bottleneck=4, prompt_length=3, mini_loras=2)
    fields = {"plan": plan, "steps": 2 * STEPS, "last_blocks": 1, "batches": lambda: [images(1), images(2)], "options": options}
    return install_method(name, base.model, Request(head=base.head_name, sample=images(0, 1), **{**fields, **changes}))


def optimizer_of(tuning: Tuning) -> Any:
    return torch.optim.AdamW([p for p in tuning.model.parameters() if p.requires_grad], lr=0.02)


def train(tuning: Tuning, optimizer: Any, *, start: int = 0, stop: int = STEPS) -> None:
    tuning.model.train()
    for step in range(start, stop):
        torch.manual_seed(step)
        tuning.before_step()
        labels = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(tuning.model(pixel_values=images(100 + step)).logits, labels)
        (loss + (0 if tuning.penalty is None else tuning.penalty())).backward()
        optimizer.step()
        tuning.after_backward(step)
        optimizer.zero_grad(set_to_none=True)
    tuning.model.eval()


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(pixel_values=images(9)).logits
    return out.clone()


@pytest.mark.parametrize(("variant", "family"), cases("start"))
def test_starts_from_the_backbones_output_and_passes_each_block_once(variant: str, family: str, folders: dict[str, Path]) -> None:
    base = backbone(folders[family])
    before = logits(base.model)
    places = [base.model.get_submodule(n) for n in blocks_of(base.model)]
    shapes = {n: tuple(p.shape) for n, p in base.model.named_parameters()}
    places += [base.model.get_submodule(a.path) for a in find_targets(shapes, "attention").attentions]
    tuning = installed(variant, base)
    after = logits(tuning.model.eval())
    if variant in PROMPTS:
        assert not torch.allclose(after, before, atol=1e-4)
    elif variant == "pissa":  # what leaves the base comes back through the factors
        assert torch.allclose(after, before, atol=1e-5)
    else:
        assert torch.allclose(after, before, atol=1e-6)
    calls: Counter[int] = Counter()
    for place in places:
        place.register_forward_hook(lambda module, _inputs, _output: calls.update([id(module)]))
    logits(tuning.model)
    assert [calls[id(place)] for place in places] == [1] * len(places)


@pytest.mark.parametrize(("variant", "family"), cases("save"))
def test_what_is_saved_gives_the_same_output_on_the_backbone_as_it_was(
    variant: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = backbone(folders[family])
    start = logits(base.model)
    tuning = installed(variant, base)
    train(tuning, optimizer_of(tuning))
    expected = logits(tuning.model)
    assert (expected - start).abs().max() > 0.02
    folder = save_tuned(tuning, tmp_path, backbone=base, method=VARIANTS[variant][0], classes=("a", "b", "c"), task="single", heads=None)
    loaded = load_tuned(folder)
    assert torch.allclose(logits(loaded.model), expected, atol=1e-5)
    assert torch.equal(logits(tuning.model), expected)  # saving changes nothing
    names = {name for name, _ in loaded.model.named_parameters()}
    plain = {name for name, _ in backbone(folders[family]).model.named_parameters()}
    assert plain <= names
    assert bool(names - plain - {n for n in names if n.endswith(".bias")}) == (variant in STAYS)


@pytest.mark.parametrize(("variant", "family"), cases("merge"))
def test_merging_changes_no_output_and_leaves_a_plain_network(variant: str, family: str, folders: dict[str, Path]) -> None:
    base = backbone(folders[family])
    kind = type(base.model)
    tuning = installed(variant, base)
    train(tuning, optimizer_of(tuning))
    expected = logits(tuning.model)
    merged = tuning.merged().eval()
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert type(merged) is kind
    assert bool(list(attached(merged))) == (variant in STAYS)
    hooks = [m for m in merged.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert bool(hooks) == (variant in STAYS)
    assert torch.equal(logits(copy.deepcopy(merged)), logits(merged))


@pytest.mark.parametrize(("variant", "family"), cases("resume"))
def test_a_run_that_stopped_goes_on_to_the_same_end(variant: str, family: str, folders: dict[str, Path]) -> None:
    whole = installed(variant, backbone(folders[family]))
    train(whole, optimizer_of(whole))
    first = installed(variant, backbone(folders[family]))
    optimizer = optimizer_of(first)
    train(first, optimizer, stop=2)
    weights, state, moments = copy.deepcopy((trainable_state(first.model), first.state(), optimizer.state_dict()))
    second = installed(variant, backbone(folders[family]))
    load_trainable_state(second.model, weights)
    second.restore(state)
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(moments)
    train(second, optimizer, start=2)
    assert torch.equal(logits(second.model), logits(whole.model))
    assert torch.equal(logits(second.model), logits(second.model))  # nothing is drawn in evaluation
