"""Methods with modules of their own, from settings to the folder that is used again: counts, cards, whole runs on a Swin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from medlore.errors import DataError, TargetError
from medlore.models.backbones.reading import load_backbone
from medlore.tuning.finetune import FinetuneResult, FinetuneSettings, choose_plan, finetune
from medlore.tuning.tuned import load_tuned
from tiny_backbone import striped, write_backbone


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("vit") / "backbone")


def run(model: Path, out: Path | None = None, **changes: Any) -> FinetuneResult:
    fields = {
        "model": str(model),
        "epochs": 2,
        "batch_size": 6,
        "shots": 4,
        "bootstrap": 0,
        "learning_rate": 0.02,
        "augment": False,
        "features": "own",
    }
    return finetune(FinetuneSettings(**{**fields, **changes}), out, train=striped(12), test=striped(6, seed=9))


CASES: list[tuple[dict[str, Any], int, str]] = [
    ({"method": "repadapter", "bottleneck": 4}, 4 * (32 * 4 + 4 + 32 * 2 + 32), "weights"),
    ({"method": "vpt-deep", "prompt_length": 2}, 2 * 2 * 32, "weights"),
    ({"method": "glora", "rank": 2, "glora_path": "lora,none,none,none,vector"}, 6 * (2 * 64 + 32), "weights"),
    ({"method": "melora", "rank": 4, "mini_loras": 2}, 6 * 2 * 64, "adapter"),
]


@pytest.mark.parametrize(("values", "added", "form"), CASES, ids=[str(c[0]["method"]) for c in CASES])
def test_a_run_counts_saves_and_predicts(values: dict[str, Any], added: int, form: str, vit: Path, tmp_path: Path) -> None:
    result = run(vit, tmp_path, **values)
    report = json.loads((tmp_path / "report.json").read_text())["results"]
    assert report["trainable_parameters"] - report["head_parameters"] == added
    assert report["total_parameters"] == report["backbone"]["parameters"] + added
    assert report["factor_parameters"] == (None if result.plan is None else added)
    assert (tmp_path / form / "medlore.json").is_file()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32))
    with torch.inference_mode():
        expected, got = result.model(pixel_values=x).logits, load_tuned(tmp_path).model(pixel_values=x).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_component_masks_reach_the_run(vit: Path, tmp_path: Path) -> None:
    masked = run(vit, tmp_path, method="sr-lora", component_masks="shapley")
    plain = run(vit, method="sr-lora")
    assert masked.plan is not None
    assert plain.plan is not None
    assert masked.plan.layers == plain.plan.layers
    assert [e["train_loss"] for e in masked.history.epochs] != [e["train_loss"] for e in plain.history.epochs]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_an_equal_rank_is_equal_in_parameters(vit: Path) -> None:
    settings = [FinetuneSettings(model=str(vit), method=m, rank="equal", scale=0.2, mini_loras=2) for m in ("lora", "melora")]
    backbone = load_backbone(vit, classes=3)
    lora, melora = (choose_plan(s, backbone) for s in settings)
    assert lora is not None
    assert melora is not None
    assert {layer.rank for layer in melora.layers} == {2 * layer.rank for layer in lora.layers}


def test_a_card_that_was_changed_is_refused(vit: Path, tmp_path: Path) -> None:
    run(vit, tmp_path, method="adapter", bottleneck=4)
    card = tmp_path / "weights" / "medlore.json"
    content = json.loads(card.read_text())
    assert content["modules"]["kind"] == "adapter"
    for change, error, match in (
        ({"kind": "adaptor"}, DataError, "modules.kind"),
        ({"nose": 1}, DataError, "modules.nose"),
        ({"options": {**content["modules"]["options"], "bottleneck": 8}}, TargetError, "do not fit"),
        ({"kind": "adaptformer"}, TargetError, "do not fit"),
    ):
        card.write_text(json.dumps(content | {"modules": content["modules"] | change}))
        with pytest.raises(error, match=match):
            load_tuned(tmp_path)


def test_a_path_of_glora_is_checked_with_the_other_settings() -> None:
    with pytest.raises(pydantic.ValidationError, match="C: 'scalar', known are lora, vector, none"):
        FinetuneSettings(method="glora", glora_path="lora,lora,scalar,vector,vector")


def test_adalora_writes_a_checkpoint_before_its_first_pruning_and_goes_on_from_it(vit: Path, tmp_path: Path) -> None:
    from medlore.training.watching import Watcher

    class Stopped(Watcher):
        def epoch(self, record: dict[str, Any]) -> None:
            if record["epoch"] == 2:
                raise KeyboardInterrupt

    settings = FinetuneSettings(
        model=str(vit), method="adalora", epochs=24, batch_size=6, shots=4, bootstrap=0, learning_rate=0.02, augment=False, rank=2
    )  # two steps an epoch, and pruning begins after a tenth of them
    parts = {"train": striped(12), "test": striped(6, seed=9)}
    whole = finetune(settings, **parts)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, tmp_path / "run", watcher=Stopped(), **parts)
    resumed = finetune(settings, tmp_path / "run", resume=True, **parts)
    assert np.array_equal(resumed.scores, whole.scores)  # type: ignore[arg-type]
