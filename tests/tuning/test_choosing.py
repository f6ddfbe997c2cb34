"""Method, rate and length chosen on the shots alone, and methods side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medlore.errors import CheckpointError, InputError
from medlore.files import read_json
from medlore.training.accelerator import make_accelerator
from medlore.tuning import choosing
from medlore.tuning.choosing import candidates_of, choose_on_shots
from medlore.tuning.finetune import finetune
from medlore.tuning.preparing import Workshop
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.side_by_side import compare_methods, known_methods
from tiny_backbone import striped, write_backbone

QUICK: dict[str, Any] = {"steps": 4, "batch_size": 6, "bootstrap": 20, "features": "own", "rank": 2, "scale": 0.3}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "vit")


def workshop() -> Workshop:
    return Workshop(make_accelerator("cpu", "fp32", None))


def ticking(step: float) -> Any:
    """A clock that goes on by so many seconds whenever somebody looks at it."""
    times: Iterator[float] = iter(np.arange(0, 1e6, step).tolist())
    return lambda: next(times)


def test_auto_chooses_on_the_shots_and_goes_on_after_a_kill(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medlore.training.watching import Watcher

    class Counting(Watcher):
        steps = 0

        def step(self, loss: float) -> None:
            self.steps += 1

    monkeypatch.setattr(choosing, "REPEATS", 1)
    monkeypatch.setattr(choosing, "FOLDS", 2)
    settings = FinetuneSettings(model=str(backbone), method="auto", shots=4, **QUICK)
    seen = Counting()
    result = finetune(settings, tmp_path / "run", train=striped(), watcher=seen)
    choice = result.report["choice"]
    assert [row["candidate"] for row in choice["candidates"]] == ["linear-probe", "lora", "sr-lora"]
    assert [row["chosen"] for row in choice["candidates"]].count(True) == 1
    assert result.report["method"] == choice["chosen"]
    assert (choice["folds"], choice["trained_folds"]) == (2, 2)
    assert seen.steps >= 2 * 3
    row = choice["candidates"][0]
    assert row["balanced_accuracy"]["low"] <= row["balanced_accuracy"]["value"] <= row["balanced_accuracy"]["high"]
    assert not (tmp_path / "run" / "choice.json").exists()
    report = read_json(tmp_path / "run" / "report.json")
    assert report["settings"]["method"] == "auto"
    assert report["results"]["choice"]["chosen"] == choice["chosen"]

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    from medlore.tuning import finetune as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "_conclude", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "killed", train=striped())
    again = Counting()
    monkeypatch.setattr(choosing, "_asked", killed)  # nothing is tried twice
    finetune(settings, tmp_path / "killed", train=striped(), resume=True, watcher=again)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "choice.json").write_text('{"fingerprint": "of another run"}')
    with pytest.raises(CheckpointError, match="a choice of other settings or data"):
        finetune(settings, tmp_path / "other", train=striped(), resume=True)


def test_the_simpler_is_taken_within_one_standard_error() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 40)
    noise -= noise.mean()
    error = noise.std(ddof=1) / np.sqrt(40)
    assert choosing._within_one_error(noise + 0.9 * error, None)
    assert not choosing._within_one_error(noise + 1.1 * error, None)
    twice = np.repeat(noise + 0.9 * error, 2)  # as 80 images of their own they would be surer
    assert not choosing._within_one_error(twice, None)
    assert choosing._within_one_error(twice, [f"p{i // 2}" for i in range(80)])


def test_a_budget_ends_the_search_and_one_that_is_too_small_is_refused(backbone: Path) -> None:
    settings = FinetuneSettings(model=str(backbone), method="auto", budget_minutes=0.3, **QUICK)
    found = choose_on_shots(settings, striped(4), workshop(), clock=ticking(1.0))
    assert 1 <= found.report["trained_folds"] < 4
    with pytest.raises(InputError, match=r"--budget-minutes: 0.01 minutes, in which 1 of 3 candidates.*give about"):
        choose_on_shots(settings.changed(budget_minutes=0.01), striped(4), workshop(), clock=ticking(1.0))


def test_one_image_a_class_chooses_the_simplest(backbone: Path) -> None:
    settings = FinetuneSettings(model=str(backbone), method="auto", **QUICK)
    found = choose_on_shots(settings, striped(1), workshop())
    assert found.settings.method == "linear-probe"
    assert "one image" in found.report["why"]


def test_cv_tries_rates_and_lengths_of_one_method() -> None:
    settings = FinetuneSettings(method="lora", tune="cv", rank=2, epochs=4)
    made = candidates_of(settings, 12)
    assert len(made) == 6
    rate = settings.rates()[0]
    assert [each.settings.rates()[0] / rate for each in made[:3]] == pytest.approx([0.3, 1, 3])
    assert [each.settings.passes(12) for each in made] == [4, 4, 4, 12, 12, 12]
    assert {each.settings.method for each in made} == {"lora"}


def test_a_budget_without_a_choice_is_refused(backbone: Path) -> None:
    with pytest.raises(InputError, match="--budget-minutes: can have no effect"):
        finetune(FinetuneSettings(model=str(backbone), budget_minutes=2), train=striped(4))


def test_methods_side_by_side_share_their_images_and_features(backbone: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    import torch

    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, _output: seen.append(len(inputs[0])) if type(module).__name__ == "ViTEmbeddings" else None
    )
    settings = FinetuneSettings(model=str(backbone), shots=4, probe_views=0, **QUICK)
    try:
        found = compare_methods(settings, ("linear-probe", "LoRA"), tmp_path, train=striped(8))
    finally:
        handle.remove()
    assert [row["method"] for row in found.rows] == ["linear-probe", "lora"]
    probe = found.rows[0]
    assert probe["score"]["value"] == pytest.approx(found.probe["value"])
    assert probe["difference"]["value"] == 0
    assert found.majority == pytest.approx(1 / 3)
    report = read_json(tmp_path / "report.json")["results"]
    assert [row["method"] for row in report["table"]] == ["linear-probe", "lora"]
    assert (tmp_path / "lora" / "adapter" / "medlore.json").is_file()
    first = read_json(tmp_path / "lora" / "report.json")["results"]["data"]
    assert first == read_json(tmp_path / "linear-probe" / "report.json")["results"]["data"]
    shots, judges = 12, first["test"]["images"]
    # frozen: shots and test once for both; then test for each method, and three passes of shots (with the sample of the method) for lora
    assert sum(seen) <= shots + judges + 2 * judges + 3 * shots + 2


def test_unknown_methods_are_named_at_once() -> None:
    assert known_methods(("SR-LoRA", "full")) == ("sr-lora", "full")
    with pytest.raises(InputError, match="--compare: 3 faults") as caught:
        known_methods(("sr-lorra", "lora", "ful", "LoRA"))
    assert "sr-lora" in caught.value.faults[0]
