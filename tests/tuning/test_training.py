"""The training loop: golden learning rates, selection, early stopping, resuming to the bit, loud failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medlore.errors import CheckpointError, StepError
from medlore.layers.tuning.interface import Tuning
from medlore.training.accelerator import make_accelerator
from medlore.training.checkpoint import read_checkpoint
from medlore.training.task import seed_of
from medlore.training.watching import Watcher
from medlore.tuning.training import EpochSchedule, Examples, Trainer, loss_of, predict_logits

# sr-lora reference, section 10.5: base 1e-3, 100 steps
GOLDEN_RATES = {
    (0.0, 0.2): {0: 1e-6, 1: 5.09374296e-5, 10: 4.88251893e-4, 19: 8.6790895e-4, 20: 9.04508497e-4, 50: 5e-4, 99: 2.46719817e-7},
    (1e-5, 0.2): {10: 4.88374374e-4, 20: 9.05463412e-4, 50: 5.05e-4, 99: 1.02442526e-5},
    (1e-5, 1.0): {10: 9.84554932e-5, 50: 2.527525e-4, 42: 2.64166926e-4, 99: 1.01419125e-5},
}


@pytest.mark.parametrize(("low", "warmup"), list(GOLDEN_RATES))
def test_learning_rates_are_the_published_ones(low: float, warmup: float) -> None:
    schedule = EpochSchedule(epochs=10, learning_rate=1e-3, min_learning_rate=low, warmup_fraction=warmup).in_steps(10)
    for step, rate in GOLDEN_RATES[low, warmup].items():
        assert schedule.rate(step, schedule.steps) == pytest.approx(rate, rel=1e-7)


def test_losses() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.5]])
    assert float(loss_of(logits, torch.tensor([0, 1]), "single")) == pytest.approx((np.log1p(np.exp(-3.0)) + np.log(2)) / 2)
    each = np.log1p(np.exp([-2.0, 1.0, -0.5, 0.5]))
    targets = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert float(loss_of(logits, targets, "multi")) == pytest.approx(each.mean())


class Recorder(Watcher):
    """Remembers what a watcher receives; can pull the plug after an epoch."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.steps = self.skipped = 0
        self.stop_after = stop_after

    def skip(self, steps: int) -> None:
        self.skipped += steps

    def step(self, loss: float) -> None:
        self.steps += 1
        if self.stop_after is not None and len(self.epochs) >= self.stop_after:
            raise KeyboardInterrupt

    def epoch(self, record: dict[str, Any]) -> None:
        self.epochs.append(record)


class Net(nn.Module):
    """A head on flat features, with dropout so that random states matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.drop, self.linear = nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(self.drop(x))
        return out


def examples(count: int = 10, *, shift: float = 1.0) -> Examples:
    rng = np.random.default_rng(4)
    targets = np.arange(count) % 2
    features = torch.from_numpy((rng.standard_normal((count, 4)) + shift * targets[:, None]).astype(np.float32))

    def inputs(indices: np.ndarray, *, step: int | None) -> torch.Tensor:
        noise = torch.randn(len(indices), 4, generator=torch.Generator().manual_seed(step or 0))
        return features[torch.from_numpy(indices)] + (0.1 * noise if step is not None else 0)

    return Examples(inputs, targets.astype(np.int64))


def trainer(net: Net, watcher: Recorder, judge: Any = None, **changes: Any) -> Trainer:
    schedule = EpochSchedule(**{"epochs": 6, "batch_size": 4, "learning_rate": 0.05, **changes.pop("schedule", {})})
    return Trainer(
        tuning=Tuning(net, "weights", save=lambda _: None, merged=lambda: net),
        task="single",
        schedule=schedule,
        accelerator=make_accelerator("cpu", "fp32", None),
        judge=judge or (lambda targets, scores: float((scores.argmax(1) == targets).mean())),
        watcher=watcher,
        **changes,
    )


def scores_of(values: list[float]) -> Any:
    left = iter(values)
    return lambda targets, scores: next(left)


def test_the_epoch_with_the_best_validation_score_is_kept() -> None:
    watcher, net = Recorder(), Net()
    states = []

    def judge(targets: Any, scores: Any) -> float:
        states.append(net.linear.weight.detach().clone())
        return [0.2, 0.7, 0.9, 0.4, 0.9, float("nan")][len(states) - 1]

    history = trainer(net, watcher, judge).fit(examples(), examples())
    losses = [r["validation_loss"] for r in watcher.epochs]
    best = 3 if losses[2] <= losses[4] else 5  # equal scores: the lower loss
    assert history.best_epoch == best
    assert torch.equal(net.linear.weight, states[best - 1])
    assert not torch.equal(net.linear.weight, states[0])


def test_without_validation_the_last_epoch_is_kept() -> None:
    net = Net()
    history = trainer(net, Recorder()).fit(examples(), None)
    assert history.best_epoch == 6
    assert "validation_score" not in history.epochs[0]


def test_patience_stops_early() -> None:
    watcher = Recorder()
    history = trainer(Net(), watcher, scores_of([0.5, 0.6, 0.1, 0.1, 0.1, 0.1]), schedule={"patience": 2}).fit(examples(), examples())
    assert history.stopped == "patience"
    assert len(history.epochs) == 4
    assert history.best_epoch == 2


def test_same_seed_same_bits_and_another_seed_not() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # what was drawn before must not matter
        net = Net()
        trainer(net, Recorder(), schedule={"seed": seed}).fit(examples(), examples())
        weights.append(net.linear.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resuming_gives_the_bits_of_an_unbroken_run(tmp_path: Path, stop_after: int) -> None:
    whole = Net()
    expected = trainer(whole, Recorder()).fit(examples(), examples())
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        trainer(Net(), Recorder(stop_after), checkpoint=checkpoint, fingerprint="a").fit(examples(), examples())
    watcher, net = Recorder(), Net()
    history = trainer(net, watcher, checkpoint=checkpoint, fingerprint="a").fit(examples(), examples(), resume=True)
    assert len(watcher.epochs) == 6 - stop_after
    assert (watcher.skipped, watcher.skipped + watcher.steps) == (3 * stop_after, 18)  # 10 images in batches of 4
    assert torch.equal(net.linear.weight, whole.linear.weight)
    assert history == expected


def half_precision(net: Net, watcher: Recorder, **changes: Any) -> Trainer:
    """A trainer with the scaler that float16 brings; its scale doubles every four steps."""
    made = trainer(net, watcher, **changes)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=4)
    return made


def test_resuming_takes_the_scale_of_half_precision_along(tmp_path: Path) -> None:
    whole = half_precision(Net(), Recorder())
    whole.fit(examples(), None)
    assert whole.accelerator.scaler.get_scale() == 2.0 * 2**4  # 18 steps
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        half_precision(Net(), Recorder(3), checkpoint=checkpoint).fit(examples(), None)
    resumed = half_precision(Net(), Recorder(), checkpoint=checkpoint)
    resumed.fit(examples(), None, resume=True)
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert torch.equal(resumed.tuning.model.linear.weight, whole.tuning.model.linear.weight)  # type: ignore[union-attr]


def test_patience_that_ran_out_before_the_kill_still_holds(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    trainer(Net(), Recorder(), scores_of([0.5, 0.1, 0.1]), schedule={"patience": 2}, checkpoint=checkpoint).fit(examples(), examples())
    watcher = Recorder()
    history = trainer(Net(), watcher, schedule={"patience": 2}, checkpoint=checkpoint).fit(examples(), examples(), resume=True)
    assert watcher.steps == 0
    assert history.best_epoch == 1


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    trainer(Net(), Recorder(), checkpoint=checkpoint, fingerprint="a").fit(examples(), None)
    with pytest.raises(CheckpointError, match="other settings, data or weights"):
        trainer(Net(), Recorder(), checkpoint=checkpoint, fingerprint="b").fit(examples(), None, resume=True)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a whole torch file"):
        read_checkpoint(checkpoint)
    torch.save({"a": torch.ones(2)}, checkpoint)
    with pytest.raises(CheckpointError, match="another kind of file"):
        read_checkpoint(checkpoint)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    broken = Examples(lambda indices, step: torch.full((len(indices), 4), float("nan")), np.zeros(4, np.int64))
    with pytest.raises(StepError, match="the loss is nan"):
        trainer(Net(), Recorder()).fit(broken, None)


def test_clipping_and_decay_reach_the_optimizer() -> None:
    free, clipped = Net(), Net()
    trainer(free, Recorder(), schedule={"epochs": 1, "clip": None}).fit(examples(shift=100.0), None)
    trainer(clipped, Recorder(), schedule={"epochs": 1, "clip": 1e-6}).fit(examples(shift=100.0), None)
    assert not torch.equal(free.linear.weight, clipped.linear.weight)
    plain, decayed = Net(), Net()
    for net, decay in ((plain, 0.0), (decayed, 5.0)):
        trainer(net, Recorder(), schedule={"epochs": 1, "weight_decay": decay, "clip": 1e-9}).fit(examples(), None)
    assert decayed.linear.weight.norm() < 0.8 * plain.linear.weight.norm()
    assert torch.allclose(decayed.linear.bias, plain.linear.bias, atol=0.05)  # vectors do not decay


def test_every_epoch_and_process_has_its_own_draws() -> None:
    assert len({seed_of(0, epoch, rank) for epoch in range(5) for rank in range(3)}) == 15
    orders: list[list[int]] = []

    def inputs(indices: np.ndarray, *, step: int | None) -> torch.Tensor:
        orders.append(indices.tolist())
        return torch.zeros(len(indices), 4)

    trainer(Net(), Recorder(), schedule={"epochs": 2, "batch_size": 10}).fit(Examples(inputs, np.zeros(10, np.int64)), None)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]


def test_predictions_keep_the_order_and_batches_do_not_matter() -> None:
    net, data = Net(), examples(7)
    accelerator = make_accelerator("cpu", "fp32", None)
    a, b = (predict_logits(net, data.inputs, 7, accelerator=accelerator, batch_size=size) for size in (2, 64))
    assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(a, net(data.inputs(np.arange(7), step=None)), atol=1e-6)
