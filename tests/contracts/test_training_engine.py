"""What the engine promises, for every kind of training: see `tests/training_kinds.py`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medlore.decomposing.trained_once import TrainedOnce, identity_of
from medlore.errors import CheckpointError, StepError
from medlore.training.accelerator import make_accelerator
from medlore.training.checkpoint import Checkpoint
from medlore.training.history import History
from medlore.training.loop import train
from medlore.training.schedule import CosineAfterWarmup, Schedule
from medlore.training.task import Judgement, Stretch, Task
from medlore.training.watching import NetworkTracking, Tracking, Watcher
from training_kinds import KEEP_BEST, KINDS, STEPS, kind

ROOT = Path(__file__).resolve().parents[2]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the made-up study lies."""
    return tmp_path_factory.mktemp("kinds")


def made(name: str, folder: Path, scores: list[float] | None = None) -> Task:
    return kind(name).make(make_accelerator("cpu", "fp32"), folder, scores)


def copy_of(state: State) -> State:
    return {key: value.detach().clone() for key, value in state.items()}


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def facts(history: History) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(history).items() if key not in ("seconds", "waited")}


class KilledError(Exception):
    """Stands for the end of the process."""


class StopAfter(Watcher):
    """Ends the process, or as good as that, when a step is done."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, loss: float) -> None:
        del loss
        self.left -= 1
        if self.left == 0:
            raise KilledError


# ---- Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_training_that_was_killed_ends_where_an_unbroken_one_ends(name: str, folder: Path, tmp_path: Path) -> None:
    one = kind(name)
    whole = made(name, folder)
    expected = train(whole, one.schedule)
    for killed_in, first_state in ((4, 2), (6, 4)):  # a checkpoint after every judgement, at 2 and 4
        checkpoint = Checkpoint(tmp_path / f"{killed_in}.pt", "a")
        with pytest.raises(KilledError):
            train(made(name, folder), one.schedule, checkpoint=checkpoint, watcher=StopAfter(killed_in))
        assert checkpoint.read()["step"] == first_state
        resumed = made(name, folder)
        torch.manual_seed(99)  # nothing may hang on what was drawn before
        torch.rand(7)
        history = train(resumed, one.schedule, checkpoint=checkpoint)
        assert equal(whole.state(), resumed.state())
        assert equal(whole.kept(), resumed.kept())
        assert facts(history) == facts(expected)
    assert [len(expected.scores), len(expected.losses)] == [3, 3 if one.schedule.log_every == 2 else 2]


@pytest.mark.parametrize("name", ["pre-training", "segmenter", "classifier"])
def test_checkpoints_by_the_clock_may_stand_between_judgements(name: str, folder: Path, tmp_path: Path) -> None:
    one, whole, resumed = kind(name), made(name, folder), made(name, folder)
    expected = train(whole, one.schedule)
    checkpoint = Checkpoint(tmp_path / "c.pt", "a", minutes=0.0)
    with pytest.raises(KilledError):
        train(made(name, folder), one.schedule, checkpoint=checkpoint, watcher=StopAfter(4))
    assert checkpoint.read()["step"] == 3
    assert facts(train(resumed, one.schedule, checkpoint=checkpoint)) == facts(expected)
    assert equal(whole.state(), resumed.state())


KILLED = """
import os, signal, sys
from pathlib import Path
from medlore.training.accelerator import make_accelerator
from medlore.training.checkpoint import Checkpoint
from medlore.training.loop import train
from medlore.training.watching import Watcher
from training_kinds import kind

class Kill(Watcher):
    done = 0
    def step(self, loss):
        self.done += 1
        if self.done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
one = kind(name)
train(one.make(make_accelerator("cpu", "fp32"), folder), one.schedule, checkpoint=Checkpoint(out / "c.pt", "a"), watcher=Kill())
"""


def environment() -> dict[str, str]:
    places = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.parametrize("name", ["tuning", "segmenter"])
def test_a_process_that_was_killed_can_be_gone_on_with(name: str, folder: Path, tmp_path: Path) -> None:
    whole, resumed = made(name, folder), made(name, folder)  # the study is written by now
    command = [sys.executable, "-c", KILLED, name, str(folder), str(tmp_path)]
    died = subprocess.run(command, env=environment(), capture_output=True, timeout=500, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    checkpoint = Checkpoint(tmp_path / "c.pt", "a")
    assert checkpoint.read()["step"] == 4
    history = train(resumed, kind(name).schedule, checkpoint=checkpoint)
    assert facts(history) == facts(train(whole, kind(name).schedule))
    assert equal(whole.state(), resumed.state())


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_that_is_damaged_or_of_another_training_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    task, schedule = made(name, folder), dataclasses.replace(kind(name).schedule, stop_at=2)
    checkpoint = Checkpoint(tmp_path / "c.pt", "a", restart="delete it")
    train(task, schedule, checkpoint=checkpoint)
    whole = checkpoint.path.read_bytes()
    with pytest.raises(CheckpointError, match=r"c\.pt: a checkpoint of a run with other settings, data or weights.*delete it"):
        train(task, schedule, checkpoint=Checkpoint(checkpoint.path, "b", restart="delete it"))
    saved = torch.load(checkpoint.path, weights_only=True)
    weights = {key: torch.zeros(3, 3, 3) for key in saved["weights"]}
    for content, message in (
        (whole[: len(whole) // 2], r"c\.pt: damaged: not a whole torch file.*To do: delete it"),
        (b"", r"c\.pt: damaged"),
        ({"weights": {}}, r"c\.pt: another kind of file.*To do: delete it"),
        ({**saved, "weights": weights}, r"c\.pt: of another network.*To do: delete it"),
        ({**saved, "optimizer": {"state": {}, "param_groups": []}}, r"c\.pt: of another network"),
    ):
        if isinstance(content, bytes):
            checkpoint.path.write_bytes(content)
        else:
            torch.save(content, checkpoint.path)
        with pytest.raises(CheckpointError, match=message):
            train(task, schedule, checkpoint=checkpoint)
    train(task, schedule, checkpoint=checkpoint, resume=False)  # whoever begins anew is not asked
    assert checkpoint.read()["step"] == 2


# ---- Steps ----------------------------------------------------------------------------------------------------------------


def norms(task: Task, schedule: Schedule) -> list[float]:
    """Norm of the gradient that each step of the optimiser is given."""
    found: list[float] = []
    before = task.updated

    def updated(step: int) -> None:
        found.append(math.sqrt(sum(float(p.grad.square().sum()) for _, p in task.parameters() if p.grad is not None)))
        before(step)

    task.updated = updated  # type: ignore[method-assign]
    train(task, schedule)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_clipping_acts(name: str, folder: Path) -> None:
    schedule = kind(name).schedule
    free = norms(made(name, folder), dataclasses.replace(schedule, clip=None))
    limit = 0.5 * min(free)
    clipped = norms(made(name, folder), dataclasses.replace(schedule, clip=limit))
    assert len(clipped) == STEPS
    assert clipped[0] == pytest.approx(limit, rel=1e-3)
    assert max(clipped) <= 1.001 * limit


@pytest.mark.parametrize("name", KINDS)
def test_decay_spares_vectors(name: str, folder: Path) -> None:
    """Gradients are clipped to nothing, so that only the decay moves anything."""
    one, task = kind(name), made(name, folder)
    before = {key: p.detach().clone() for key, p in task.parameters()}
    schedule = dataclasses.replace(
        one.schedule, rate=CosineAfterWarmup(0.1, 1.0, 0.0), weight_decay=1.0, clip=1e-14, ema=None, judge_every=0, stop_at=2
    )
    train(task, schedule)
    decayed = 0
    for key, p in task.parameters():
        moved = float((p.detach() - before[key]).norm() / before[key].norm().clamp_min(1e-12))
        if p.ndim < 2 or key.endswith(one.spared or ("nothing is",)):
            assert moved < 1e-3 or float(before[key].norm()) == 0, key
        elif float(before[key].norm()) > 0:  # a factor that begins as zero has nothing to lose
            assert moved == pytest.approx(1 - 0.9**2, abs=0.01), key
            decayed += 1
    assert decayed


@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_finite_stops_with_the_last_good_state_and_the_cases(name: str, folder: Path, tmp_path: Path) -> None:
    one, whole = kind(name), made(name, folder)
    train(whole, one.schedule)
    for poison in (lambda p: p.flatten()[0] * math.nan, lambda p: (p.flatten()[0] * 0).sqrt()):  # the loss; only its gradient
        task, checkpoint = made(name, folder), Checkpoint(tmp_path / "c.pt", "a")
        checkpoint.path.unlink(missing_ok=True)
        states, loss = [], task.loss

        def poisoned(batch: Any, step: int, task: Task = task, poison: Any = poison, loss: Any = loss, states: Any = states) -> Any:
            if step < 3:
                return loss(batch, step)
            states.append(copy_of(dict(task.parameters())))
            return {**loss(batch, step), "bad": poison(next(p for p in task.module.parameters() if p.requires_grad))}

        task.loss = poisoned  # type: ignore[method-assign]
        with pytest.raises(StepError, match=r"step 3[,:].*nan.*check these cases" if one.names_cases else r"step 3: .*nan") as caught:
            train(task, one.schedule, checkpoint=checkpoint)
        assert str(checkpoint.path) in str(caught.value)
        assert equal(states[0], dict(task.parameters()))  # the bad step moved nothing
        held = checkpoint.read()
        assert held["step"] == (2 if name == "tuning" else 3)  # tuning draws through an epoch: it goes on from whole ones
        assert all(torch.isfinite(value).all() for value in held["weights"].values())
        healed = made(name, folder)
        train(healed, one.schedule, checkpoint=checkpoint)
        assert equal(healed.state(), whole.state())


# ---- What is kept ---------------------------------------------------------------------------------------------------------

RISING, FALLING, TIED, NEVER, LATE = [0.2, 0.5, 0.9], [0.9, 0.5, 0.2], [0.5, 0.7, 0.7], [math.nan] * 3, [math.nan, 0.1, math.nan]


SCRIPTS = [(RISING, 3), (FALLING, 1), ([0.2, 0.9, 0.5], 2), (LATE, 2)]


@pytest.mark.parametrize(
    ("name", "scores", "best"),
    [(name, *script) for name in KEEP_BEST for script in SCRIPTS] + [("classifier", NEVER, 3)],  # of a tuning the losses decide then
)
def test_the_best_judgement_is_kept(name: str, scores: list[float], best: int, folder: Path) -> None:
    task = made(name, folder, scores)
    judged, judge = [], task.judge

    def judge_and_copy(stretch: Stretch) -> Judgement:
        judged.append(copy_of(task.kept()))
        return judge(stretch)

    task.judge = judge_and_copy  # type: ignore[method-assign]
    history = train(task, kind(name).schedule)
    assert history.best_step == 2 * best
    assert equal(task.kept(), judged[best - 1])
    assert not any(equal(task.kept(), other) for number, other in enumerate(judged, 1) if number != best)


@pytest.mark.parametrize("scores", [TIED, NEVER])
def test_equal_scores_of_a_tuning_go_to_the_lower_loss(scores: list[float], folder: Path) -> None:
    history = train(made("tuning", folder, scores), kind("tuning").schedule)
    losses = [record["validation_loss"] for record in history.scores]
    tied = [1, 2] if scores is TIED else [0, 1, 2]
    assert history.best_step == 2 * (1 + min(tied, key=lambda number: losses[number]))


def test_equal_scores_of_a_classifier_go_to_the_earlier_step(folder: Path) -> None:
    assert train(made("classifier", folder, TIED), kind("classifier").schedule).best_step == 4


@pytest.mark.parametrize("name", [name for name in KINDS if name not in KEEP_BEST])
def test_the_average_is_kept_and_judged_or_else_the_end(name: str, folder: Path) -> None:
    one, task = kind(name), made(name, folder)
    average = {key: p.detach().double() for key, p in task.parameters()}
    updated, judge = task.updated, task.judge
    seen: list[State] = []

    def take_in(step: int) -> None:
        updated(step)
        share = 1.0 if one.schedule.ema is None else 1 - min(one.schedule.ema, (step + 1) / (step + 10))
        for key, p in task.parameters():
            average[key] = average[key] + share * (p.detach().double() - average[key])

    def look(stretch: Stretch) -> Judgement:
        seen.append(copy_of(dict(task.parameters())))
        return judge(stretch)

    task.updated, task.judge = take_in, look  # type: ignore[method-assign]
    train(task, one.schedule)
    for key, p in task.parameters():
        torch.testing.assert_close(p.detach().double(), average[key], rtol=1e-4, atol=1e-6)
    assert equal(seen[-1], dict(task.parameters()))


# ---- Processes and trackers -----------------------------------------------------------------------------------------------

TWO = """
import sys
from pathlib import Path
import torch
from medlore.training.accelerator import make_accelerator
from medlore.training.loop import train
from training_kinds import KINDS, kind
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
states = {}
for name in KINDS:
    one = kind(name)
    accelerator = make_accelerator("cpu", "fp32", absent_parameters=name != "tuning")
    task = one.make(accelerator, folder)
    seen = []
    loss = task.loss
    def looking(batch, step, loss=loss, seen=seen):
        found = loss(batch, step)
        seen.append(torch.stack([t.detach() for t in found.values()]).sum())
        return found
    task.loss = looking
    history = train(task, one.schedule)
    states[name] = {"weights": task.state(), "losses": history.losses, "seen": torch.stack(seen)}
torch.save(states, out / f"{accelerator.process_index}.pt")
"""


@pytest.mark.filterwarnings("ignore")
def test_two_processes_stay_one_network(folder: Path, tmp_path: Path) -> None:
    """Each sees its own samples: were the gradients not reduced, the weights of the two would part."""
    for name in KINDS:
        made(name, folder)
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29743"]
    done = subprocess.run(
        [*launch, str(script), str(folder), str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in KINDS:
        assert not torch.equal(first[name]["seen"], second[name]["seen"]), name
        assert equal(first[name]["weights"], second[name]["weights"]), name
        assert not equal(first[name]["weights"], made(name, folder).state()), name
        assert first[name]["losses"] == second[name]["losses"], name  # means over both


@pytest.mark.parametrize("name", KINDS)
def test_trackers_get_values(name: str, folder: Path) -> None:
    from accelerate.tracking import GeneralTracker, on_main_process

    class Memory(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory = "memory", False

        def __init__(self) -> None:
            super().__init__()
            self.values: list[tuple[int, dict[str, float]]] = []

        @property
        def tracker(self) -> Any:
            return self.values

        def start(self) -> None:
            """Nothing to open."""

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            """Nothing to keep."""

        @on_main_process
        def log(self, values: dict[str, float], step: int | None = None, **_more: Any) -> None:
            self.values.append((int(step or 0), values))

    memory, accelerator = Memory(), make_accelerator("cpu", "fp32")
    accelerator.trackers = [memory]
    task = kind(name).make(accelerator, folder)
    tracking: Watcher = Tracking(accelerator) if name == "tuning" else NetworkTracking(accelerator, task.name, measure="dice")
    history = train(task, kind(name).schedule, watcher=tracking)
    logged = [values for _, values in memory.values]
    if name == "tuning":
        assert [step for step, _ in memory.values] == [1, 2, 3]
        assert [values["train_loss"] for values in logged] == [record["train_loss"] for record in history.scores]
        assert all({"learning_rate", "validation_loss", "validation_score"} <= values.keys() for values in logged)
        return
    term = next(key for key in history.losses[0] if key != "step")
    assert [values[f"{task.name}/{term}"] for values in logged if f"{task.name}/{term}" in values] == [x[term] for x in history.losses]
    assert all(values[f"{task.name}/rate"] > 0 for values in logged if f"{task.name}/rate" in values)
    scores = [record["mean"] for record in history.scores if "mean" in record]
    assert [values[f"{task.name}/validation dice"] for values in logged if f"{task.name}/validation dice" in values] == scores


# ---- The engine by itself -------------------------------------------------------------------------------------------------


class Toy(Task):
    """One number whose gradient is the batch."""

    def __init__(self, values: list[float], parts: int) -> None:
        super().__init__("toy", nn.Linear(1, 1, bias=False), make_accelerator("cpu", "fp32"))
        self.values, self.parts = values, parts
        self.gradients: list[float] = []

    def batches(self, start: int, stop: int) -> Generator[float]:
        yield from self.values[start * self.parts : stop * self.parts]

    def loss(self, batch: float, step: int) -> dict[str, Tensor]:
        del step
        return {"a": 0.25 * batch * self.forward.weight.sum(), "b": 0.75 * batch * self.forward.weight.sum()}  # type: ignore[operator,union-attr]

    def judge(self, stretch: Stretch) -> Judgement:
        return Judgement({"step": stretch.step, "loss": stretch.loss})

    def updated(self, step: int) -> None:
        del step
        self.gradients.append(float(self.module.weight.grad))  # type: ignore[arg-type,union-attr]


def test_accumulated_batches_count_as_their_mean_and_all_terms_count() -> None:
    task = Toy([1.0, 2.0, 3.0, 5.0], 2)
    history = train(task, Schedule(2, CosineAfterWarmup(0.0), clip=None, accumulate=2, log_every=1))
    assert task.gradients == [1.5, 4.0]
    weight = float(task.module.weight.detach())  # type: ignore[arg-type,union-attr]
    assert [line["a"] for line in history.losses] == pytest.approx([0.25 * 1.5 * weight, 0.25 * 4.0 * weight])
    assert history.scores[0]["loss"] == pytest.approx(4.0 * weight)


def test_every_step_has_the_rate_of_the_schedule() -> None:
    """With one gradient for ever, AdamW moves by the rate itself."""
    task, rate = Toy([1.0] * 8, 1), CosineAfterWarmup(0.25, 0.5, 0.25)
    start, places = float(task.module.weight.detach()), list[float]()  # type: ignore[arg-type,union-attr]
    task.updated = lambda _step: places.append(float(task.module.weight.detach()))  # type: ignore[method-assign,arg-type,assignment,union-attr]
    train(task, Schedule(8, rate, clip=None))
    moved = [before - after for before, after in itertools.pairwise([start, *places])]
    assert moved == pytest.approx([rate(step, 8) for step in range(8)], rel=1e-4)


def test_a_copy_of_few_digits_follows_its_masters(folder: Path) -> None:
    task = made("pre-training", folder)
    seen, updated = list[bool](), task.updated

    def look(step: int) -> None:
        assert all(p.grad is None for p in task.module.parameters())
        updated(step)
        pairs = zip(task.parameters(), task.module.parameters(), strict=True)
        seen.append(all(torch.equal(copied, own.to(copied.dtype)) for (_, own), copied in pairs))

    task.updated = look  # type: ignore[method-assign]
    train(task, kind("pre-training").schedule)
    assert seen == [True] * STEPS


def test_history_has_a_line_of_means_whatever_is_judged() -> None:
    task = Toy([float(n) for n in range(7)], 1)
    history = train(task, Schedule(7, CosineAfterWarmup(0.0), clip=None, log_every=3, judge_every=5))
    weight = float(task.module.weight.detach())  # type: ignore[arg-type,union-attr]
    assert [line["step"] for line in history.losses] == [3, 6, 7]
    assert [line["b"] for line in history.losses] == pytest.approx([0.75 * weight * mean for mean in (1.0, 4.0, 6.0)])
    assert [record["step"] for record in history.scores] == [5, 7]


def sources() -> Iterator[tuple[str, str]]:
    for room in ("src", "maintenance"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (r"optimi[sz]er\.step\(", "src/medlore/training/loop.py"),
        (r"clip_grad_norm_\(", "src/medlore/training/loop.py"),
        (r"optim\.(AdamW|Adam|SGD)\(", "src/medlore/training/optimizer.py"),
        (r"optimizer\.state_dict\(", "src/medlore/training/loop.py"),
    ],
)
def test_there_is_one_loop(words: str, place: str) -> None:
    found = [name for name, text in sources() for _ in re.findall(words, text)]
    assert found == [place]


# ---- What settings say reaches the engine ---------------------------------------------------------------------------------


def test_every_kind_hands_its_settings_on() -> None:
    from maintenance.pretrain_settings import PretrainSettings

    from medlore.decomposing.classifiers.settings import DecomposeSettings
    from medlore.decomposing.classifiers.study import _Context
    from medlore.decomposing.segmenters.settings import ScheduleSettings, SegmenterLossSettings
    from medlore.decomposing.segmenters.training import SegmenterTrainingPlan
    from medlore.tuning.training import EpochSchedule

    values = {"learning_rate": 0.25, "weight_decay": 0.5, "clip": 0.125}
    steps = {**values, "steps": 40, "warmup_fraction": 0.25}
    segmenters = ScheduleSettings(**steps, accumulate=3, ema=0.9, final_share=0.5)
    study = DecomposeSettings(name="x", tasks=[{"name": "a", "data": "a.npz"}], evaluate_every=8, **steps)  # type: ignore[list-item]
    found = {
        "tuning": EpochSchedule(epochs=4, warmup_fraction=0.25, patience=3, min_learning_rate=0.01, **values).in_steps(10),
        "segmenter": SegmenterTrainingPlan(segmenters, SegmenterLossSettings(), 0, "fp32", validate_every=8, log_every=7).in_steps(),
        "classifier": _Context(study, {}, None, Path(), None, None).plan(40, 0.25).schedule,  # type: ignore[arg-type]
        "pre-training": PretrainSettings(
            archives=("a.zip",), steps=40, learning_rate=0.25, weight_decay=0.5, warm_up=0.25, ema_decay=0.9, stop_at=30
        ).in_steps(),
    }
    for name, schedule in found.items():
        clip = 1.0 if name == "pre-training" else 0.125
        assert (schedule.steps, schedule.weight_decay, schedule.clip, schedule.rate.peak) == (40, 0.5, clip, 0.25), name
        assert schedule.rate(5, 40) < 0.25, name
        assert vars(schedule.rate)["warmup_fraction"] == 0.25, name
    assert {name: s.judge_every for name, s in found.items()} == {"tuning": 10, "segmenter": 8, "classifier": 8, "pre-training": None}
    assert {name: s.log_every for name, s in found.items()} == {"tuning": 10, "segmenter": 7, "classifier": 8, "pre-training": 50}
    assert {name: s.ema for name, s in found.items()} == {"tuning": None, "segmenter": 0.9, "classifier": None, "pre-training": 0.9}
    assert (found["tuning"].patience, found["segmenter"].accumulate, found["pre-training"].end) == (3, 3, 30)
    assert (found["tuning"].rate(40, 40), found["segmenter"].rate(40, 40)) == pytest.approx((0.01, 0.125))


# ---- A network is trained once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["weights.pt", "best.pt"])
def test_a_network_is_trained_once_and_taken_over(file: str, tmp_path: Path) -> None:
    networks = TrainedOnce(tmp_path, make_accelerator("cpu", "fp32"), weights=file)
    identity, changed, asked = identity_of({"a": 1, "b": [2]}), identity_of({"a": 1, "b": [3]}), list[Checkpoint]()

    def training(network: nn.Module) -> Any:
        def run(checkpoint: Checkpoint) -> dict[str, Any]:
            asked.append(checkpoint)
            nn.init.ones_(network.weight)  # type: ignore[arg-type]
            return {"losses": [1.0]}

        return run

    first, second, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(3, 2)
    assert networks.state_of("one", identity) == "to be trained"
    assert networks.finish("one", identity, first, training(first)) == {"losses": [1.0]}
    assert networks.state_of("one", identity) == "trained"
    assert networks.finish("one", identity, second, training(second)) == {"losses": [1.0]}
    assert len(asked) == 1
    assert equal(first.state_dict(), second.state_dict())
    networks.finish("two", identity, nn.Linear(2, 2), training(second))
    networks.finish("two", changed, nn.Linear(2, 2), training(second))
    assert [checkpoint.fingerprint for checkpoint in asked] == [identity, identity, changed]  # other data are learnt anew
    assert identity_of({"b": [2], "a": 1}) == identity != changed
    assert networks.state_of("one", identity_of(3)) == "to be trained"
    with pytest.raises(CheckpointError, match=rf"{file}: of another network.*To do: delete .*one and run again"):
        networks.finish("one", identity, other, training(other))
    weights = tmp_path / "one" / file
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"{file}: damaged.*To do: delete .*one and run again"):
        networks.finish("one", identity, second, training(second))
    weights.unlink()
    assert networks.state_of("one", identity) == "to be trained"
    asked[0].write({"step": 1})
    assert networks.state_of("one", identity) == "begun"
