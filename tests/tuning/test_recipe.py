"""The recipe: a probe first, everything else from there, all labels trained on in the end, and an honest comparison at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from medlore.data.images.imageset import ImageSet, from_arrays
from medlore.data.images.splits import SplitRules, split_images
from medlore.errors import DataError, InputError
from medlore.files import read_json
from medlore.models.backbones.cutting import Cut, block_features, cut_backbone, own_cut
from medlore.models.backbones.reading import load_backbone
from medlore.training.accelerator import make_accelerator
from medlore.tuning.evaluate import EvaluateSettings, evaluate
from medlore.tuning.examples import image_examples, preprocessing_of
from medlore.tuning.finetune import finetune
from medlore.tuning.preparing import Workshop, prepare
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.tuned import load_tuned
from medlore.tuning.verdict import verdict_of
from tiny_backbone import striped, two_labels, write_backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "vit")


def noisy(count: int = 16) -> ImageSet:
    """Stripes that a probe can only partly tell apart."""
    images = striped(count)
    rng = np.random.default_rng(7)
    pixels = [(0.25 * np.asarray(item.source, float) + rng.normal(90, 45, (16, 16))).clip(0, 255).astype(np.uint8) for item in images.items]
    return from_arrays(pixels, images.targets(), classes=list(images.classes), name="noisy")


def features_of(folder: Path, images: ImageSet) -> np.ndarray[Any, Any]:
    """What the head of the whole network reads: class token behind the last norm."""
    import transformers

    network = load_backbone(folder, classes=3)
    body = transformers.AutoModel.from_pretrained(folder).eval()
    examples = image_examples(images, preprocessing_of(network))
    with torch.inference_mode():
        return body(pixel_values=examples.inputs(np.arange(len(images)), step=None)).last_hidden_state[:, 0].numpy()


def test_the_linear_probe_is_a_regression_on_standardised_features(backbone: Path, tmp_path: Path) -> None:
    pool, test = noisy(8), noisy(16)
    settings = FinetuneSettings(
        model=str(backbone), method="linear-probe", features="own", probe_strength=0.05, probe_views=0, bootstrap=20
    )
    result = finetune(settings, tmp_path, train=pool, test=test)
    near, far = features_of(backbone, pool), features_of(backbone, test)
    mean, deviation = near.mean(0), near.std(0)
    theirs = LogisticRegression(C=0.05, tol=1e-9, max_iter=20_000).fit((near - mean) / deviation, pool.targets())
    assert np.allclose(result.scores, theirs.predict_proba((far - mean) / deviation), atol=2e-4)
    head = result.model.get_submodule("classifier")
    assert type(head) is torch.nn.Linear  # what predicts is a plain network
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(load_tuned(tmp_path).model(pixel_values=x).logits, result.model(pixel_values=x).logits)
    assert result.history.stopped == "solved"
    assert result.report["probe"]["difference"]["value"] == 0
    assert "itself" in result.report["verdict"]


STARTS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 2, "features": "own"},
    {"method": "sr-lora", "features": "both", "feature_block": 1},
    {"method": "ssf", "features": "mean"},
    {"method": "full", "features": "own"},
    {"method": "adaptformer", "features": "auto", "bottleneck": 4},
]


@pytest.mark.parametrize("values", STARTS, ids=[each["method"] for each in STARTS])
@pytest.mark.parametrize("task", ["single", "multi"])
def test_before_any_step_the_network_says_what_the_probe_says(values: dict[str, Any], task: str, backbone: Path) -> None:
    images = noisy(5) if task == "single" else two_labels(14)
    settings = FinetuneSettings(model=str(backbone), device="cpu", precision="fp32", **values)
    workshop = Workshop(make_accelerator("cpu", "fp32", None))
    prepared = prepare(settings, images, None, workshop)
    assert prepared.probe is not None
    whole = load_backbone(backbone, classes=len(images.classes))
    rows = workshop.features.read(whole, images, prepared.reading.cut, accelerator=workshop.accelerator)
    with torch.inference_mode():
        logits = prepared.tuning.model.eval()(pixel_values=prepared.train.inputs(np.arange(len(images)), step=None)).logits
    expected = prepared.probe.probe.logits(rows)
    assert np.abs(logits.numpy() - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_a_random_start_is_still_there(backbone: Path) -> None:
    workshop = Workshop(make_accelerator("cpu", "fp32", None))
    settings = FinetuneSettings(model=str(backbone), method="lora", start="random", features="own")
    prepared = prepare(settings, striped(4), None, workshop)
    fresh = load_backbone(backbone, classes=3, seed=0).head()
    assert prepared.probe is None
    placed = {name.rsplit(".", 1)[-1]: p for name, p in prepared.tuning.model.named_parameters() if "classifier.modules_to_save" in name}
    assert torch.equal(placed["weight"], fresh.weight)  # type: ignore[arg-type]
    assert (settings.passes(25), settings.rates()) == (20, (1e-3, 1e-3))


@pytest.mark.parametrize(("block", "reading"), [(1, "cls"), (1, "mean"), (2, "both"), (2, "mean")])
def test_a_cut_network_reads_what_was_asked(block: int, reading: Any, backbone: Path) -> None:
    whole = load_backbone(backbone, classes=3)
    x = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        hidden = whole.model(pixel_values=x, output_hidden_states=True).hidden_states[block]
        normed = whole.model.get_submodule("vit.layernorm")(hidden)
    parts = {"cls": normed[:, 0], "mean": normed[:, 1:].mean(1), "both": torch.cat([normed[:, 0], normed[:, 1:].mean(1)], 1)}
    cut = cut_backbone(load_backbone(backbone, classes=3), Cut(block, reading), classes=3)
    head = cut.head()
    with torch.inference_mode():
        assert torch.allclose(cut.model.eval()(pixel_values=x).logits, head(parts[reading]), atol=1e-5)
    assert own_cut(whole) == Cut(2, "cls")


def test_a_dinov2_reads_one_half_where_it_is_asked(tmp_path: Path) -> None:
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4, num_labels=2
    )
    torch.manual_seed(0)
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path / "dinov2")
    x = torch.randn(3, 3, 16, 16)
    for reading in ("cls", "mean", "both"):
        whole = load_backbone(tmp_path / "dinov2", classes=4)
        rows = block_features(whole, x, (2,))[:, 0]
        cut = cut_backbone(whole, Cut(2, reading), classes=4)  # type: ignore[arg-type]
        half = {"cls": rows[:, :16], "mean": rows[:, 16:], "both": rows}[reading]
        weight, bias = cut.head().weight, cut.head().bias
        with torch.inference_mode():
            assert torch.allclose(cut.model.eval()(pixel_values=x).logits, half @ weight.T + bias, atol=1e-5)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("method", ["lora", "full", "ssf"])
def test_a_cut_network_comes_back_from_disk(method: str, backbone: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(
        model=str(backbone), method=method, features="both", feature_block=1, shots=3, steps=2, batch_size=9, bootstrap=0
    )
    result = finetune(settings, tmp_path, train=striped(8))
    x = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(load_tuned(tmp_path).model(pixel_values=x).logits, result.model(pixel_values=x).logits, atol=1e-5)
    assert read_json(tmp_path / "report.json")["results"]["features"]["reading"] == "both"


def test_impossible_cuts_are_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--feature-block: got 9.*1 to 2"):
        finetune(FinetuneSettings(model=str(backbone), features="cls", feature_block=9), train=striped(4))
    with pytest.raises(InputError, match="--feature-block: can have no effect"):
        finetune(FinetuneSettings(model=str(backbone), feature_block=1), train=striped(4))
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    with pytest.raises(InputError, match=r"--features: 'mean' with a ResNet.*ViT"):
        finetune(FinetuneSettings(model=str(tmp_path / "resnet"), features="mean"), train=striped(4))


def test_bad_features_are_one_clear_error(backbone: Path) -> None:
    same = from_arrays([np.full((16, 16), 90, np.uint8)] * 12, np.repeat([0, 1, 2], 4), classes=["a", "b", "c"], name="blank")
    with pytest.raises(DataError, match=r"blank, features.*the same for every image"):
        finetune(FinetuneSettings(model=str(backbone), method="linear-probe", features="own"), train=same, test=striped(2))


def test_one_image_a_class_chooses_nothing_and_says_so(backbone: Path) -> None:
    result = finetune(FinetuneSettings(model=str(backbone), method="linear-probe", shots=1, bootstrap=0), train=striped(6))
    assert result.report["features"]["block"] == 2
    assert any("a class has one image" in note for note in result.report["notes"])
    assert result.report["data"]["validation"] is None


def test_few_shots_hold_nothing_out_and_ten_do() -> None:
    assert split_images(striped(30), SplitRules(shots=9)).validation is None
    ten = split_images(striped(40), SplitRules(shots=10)).validation
    assert ten is not None
    assert ten.counts() == {"rows": 10, "columns": 10, "diagonal": 10}
    assert split_images(striped(40), SplitRules(shots=10, validation_shots="none")).validation is None


def test_images_that_chose_the_length_are_trained_on_in_the_end(backbone: Path, tmp_path: Path) -> None:
    parts = split_images(noisy(16), SplitRules(shots=4, validation_shots=4))
    settings = FinetuneSettings(model=str(backbone), method="lora", rank=2, steps=12, batch_size=6, bootstrap=20, features="own")
    result = finetune(settings, tmp_path / "run", train=parts.train, validation=parts.validation, test=parts.test)
    chosen = result.history.best_epoch * 2  # steps: two an epoch
    assert result.report["refit"]["images"] == 24
    assert result.report["refit"]["steps"] == -(-chosen // 4) * 4  # whole passes of four steps
    assert result.report["probe"]["labels"] == 24
    alone = finetune(settings.changed(refit=False), train=parts.train, validation=parts.validation, test=parts.test)
    assert "refit" not in alone.report
    assert not np.allclose(alone.scores, result.scores)  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "refit.pt").exists()


def test_a_run_that_is_killed_while_it_trains_on_all_labels_goes_on(backbone: Path, tmp_path: Path) -> None:
    from medlore.training.watching import Watcher

    class Stopped(Watcher):
        trainings = 0

        def start(self, steps: int, epochs: int) -> None:
            self.trainings += 1

        def epoch(self, record: dict[str, Any]) -> None:
            if self.trainings == 2 and record["epoch"] == 2:
                raise KeyboardInterrupt

    parts = split_images(noisy(16), SplitRules(shots=4, validation_shots=4))
    given: dict[str, Any] = {"train": parts.train, "validation": parts.validation, "test": parts.test}
    settings = FinetuneSettings(
        model=str(backbone), method="lora", rank=2, steps=12, batch_size=6, bootstrap=0, features="own", probe_views=0, learning_rate=1e-5
    )
    whole = finetune(settings, **given)
    assert whole.report["refit"]["steps"] == 12  # the loss falls slowly, and so to the end
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, tmp_path, watcher=Stopped(), **given)
    assert (tmp_path / "refit.pt").is_file()
    resumed = finetune(settings, tmp_path, resume=True, **given)
    assert np.array_equal(resumed.scores, whole.scores)  # type: ignore[arg-type]
    assert not (tmp_path / "checkpoint.pt").exists()


def test_head_and_factors_have_rates_of_their_own(backbone: Path) -> None:
    from medlore.training.optimizer import make_optimizer
    from medlore.training.watching import Watcher
    from medlore.tuning.fitting import judge_of
    from medlore.tuning.training import Trainer, TuningTask

    images = striped(4)
    settings = FinetuneSettings(model=str(backbone), method="lora", rank=2, learning_rate=1e-3, head_learning_rate=1e-4, features="own")
    prepared = prepare(settings, images, None, Workshop(make_accelerator("cpu", "fp32", None)))
    schedule = settings.schedule(len(images))
    trainer = Trainer(
        prepared.tuning, "single", schedule, make_accelerator("cpu", "fp32", None), judge_of(images), Watcher(), head="classifier"
    )
    task = TuningTask(trainer, prepared.train, None)
    optimizer = make_optimizer(
        dict(task.parameters()), schedule.in_steps(3), spares=task.spares, fused=False, share_of_rate=task.share_of_rate
    )
    head = {id(p) for name, p in task.parameters() if "classifier" in name}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["share"] == pytest.approx(0.1 if id(parameter) in head else 1.0)
    assert len(head) == 2


def test_length_is_counted_in_steps_or_in_epochs() -> None:
    assert FinetuneSettings(steps=10).passes(25) == 2  # seven steps a pass
    assert FinetuneSettings(epochs=3).passes(25) == 3
    few, some, many = (FinetuneSettings().passes(count) for count in (5, 100, 5000))
    assert 2 * few >= 40  # a floor of steps, however few the images
    assert 25 * some <= 75  # few images do not carry the network far from the probe
    assert many == 8
    with pytest.raises(ValueError, match="steps and epochs"):
        FinetuneSettings(steps=10, epochs=3)


def test_evaluate_says_when_its_images_were_trained_on(backbone: Path, tmp_path: Path) -> None:
    images = noisy(12)
    settings = FinetuneSettings(model=str(backbone), method="lora", rank=2, steps=6, batch_size=6, shots=4, bootstrap=20)
    result = finetune(settings, tmp_path / "run", train=images)
    assert "majority answer" in result.report["verdict"]
    file = tmp_path / "all.npz"
    np.savez(file, images=np.stack([item.source for item in images.items]), labels=images.targets().astype(np.uint8))
    found = evaluate(EvaluateSettings(tuned=tmp_path / "run", data=file, bootstrap=20), tmp_path / "evaluated")
    assert found.seen == 12
    assert "12 of these 36 images trained the model" in found.verdict
    assert found.probe is not None
    assert read_json(tmp_path / "evaluated" / "report.json")["results"]["verdict"] == found.verdict


def report(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    entry = {"value": value, "low": low, "high": high}
    return {"items": 90, "task": "single", "metrics": {"balanced_accuracy": entry}, "majority": {"balanced_accuracy": 0.25}}


@pytest.mark.parametrize(
    ("test", "difference", "words"),
    [
        (report(0.3, 0.2, 0.4), (0.01, -0.05, 0.06), ["learnt nothing that these images can show", "cannot tell it from"]),
        (
            report(0.6, 0.5, 0.7),
            (0.05, 0.02, 0.08),
            ["better than the majority answer (0.250)", "It is better than the logistic regression"],
        ),
        (report(0.6, 0.5, 0.7), (-0.05, -0.08, -0.02), ["It is worse than", "--method linear-probe"]),
        (report(0.6, 0.5, 0.7), (0.001, -0.002, 0.004), ["It is as good as"]),
        (report(0.6, None, None), (0.05, None, None), ["without resamples"]),
    ],
)
def test_the_verdict_says_how_sure_it_is(test: dict[str, Any], difference: tuple[Any, ...], words: list[str]) -> None:
    text = verdict_of(test, {"difference": dict(zip(("value", "low", "high"), difference, strict=True))})
    assert all(word in text for word in words), text
