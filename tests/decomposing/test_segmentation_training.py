"""The loop of a segmenter: a killed run ends where an unbroken one ends, bad batches stop it, data arrive in order."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medlore.data.volumes.cases import Case
from medlore.data.volumes.synthesis import SynthesisRules
from medlore.decomposing.segmenters.batches import PatchSampler, batches_ahead, make_sampler
from medlore.decomposing.segmenters.cohort import Cohort, read_cohort, with_split
from medlore.decomposing.segmenters.context import NetworkJob, StudyContext, settings_rules, silent
from medlore.decomposing.segmenters.few_shot import FewShotSettings, _TunedSegmenter
from medlore.decomposing.segmenters.network import PromptedSegmenter, new_prompts
from medlore.decomposing.segmenters.settings import ScheduleSettings, SegmentationSettings, SegmenterLossSettings
from medlore.decomposing.segmenters.training import SegmenterTrainingPlan, train_segmenter
from medlore.decomposing.segmenters.validation import WindowSettings, make_validation
from medlore.errors import InputError, StepError
from medlore.layers.experts.surgery import install_experts
from medlore.models.segmenter.network import Segmenter, expert_targets
from medlore.runs.settings_file import read_settings
from medlore.training.accelerator import make_accelerator
from tiny_segmentation import write_study

SCHEDULE = ScheduleSettings(steps=4, batch_size=2, accumulate=2, learning_rate=3e-3, ema=0.9)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmentationSettings, Cohort]:
    folder = tmp_path_factory.mktemp("study")
    settings = read_settings(SegmentationSettings, write_study(folder))
    return settings, read_cohort(settings, folder=folder, cache=folder / "cache")


def sampler_of(study: tuple[SegmentationSettings, Cohort], *, mode: str = "mixed") -> PatchSampler:
    settings, cohort = study
    rules = settings_rules(settings)
    return make_sampler(cohort, patch_size=(16, 16, 16), max_prompts=3, rules=rules, batch_size=2, mode=mode, seed=3)  # type: ignore[arg-type]


def network_of(study: tuple[SegmentationSettings, Cohort], *, dropout: float = 0.2) -> PromptedSegmenter:
    settings, cohort = study
    torch.manual_seed(1)
    model = Segmenter(settings.teacher.sizes.config(), dropout=dropout)
    return PromptedSegmenter(model, new_prompts(len(cohort.keys), 16, seed=0), learn_prompts=True)


def plan_of(schedule: ScheduleSettings = SCHEDULE, *, minutes: float = 0.0) -> SegmenterTrainingPlan:
    return SegmenterTrainingPlan(
        schedule, SegmenterLossSettings(), seed=5, precision="fp32", validate_every=2, checkpoint_minutes=minutes, log_every=3
    )


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_killed_run_ends_where_an_unbroken_one_ends(study: tuple[SegmentationSettings, Cohort], tmp_path: Path) -> None:
    accelerator, checkpoint = make_accelerator("cpu", "fp32"), tmp_path / "c.pt"
    whole = network_of(study)
    score = make_validation(study[1], WindowSettings((16, 16, 16), 0.0, "fp32", SynthesisRules()), cases=1)
    unbroken = train_segmenter(whole, sampler_of(study), plan_of(), accelerator=accelerator, checkpoint=tmp_path / "w.pt", validate=score)

    def kill(step: int, _steps: int, _text: str) -> None:
        if step == 3:  # the checkpoint of step 2 is there, that of step 3 is not
            raise KilledError

    broken = network_of(study)
    with pytest.raises(KilledError):
        train_segmenter(broken, sampler_of(study), plan_of(), accelerator=accelerator, checkpoint=checkpoint, progress=kill, validate=score)
    resumed = network_of(study)
    seen: list[int] = []
    history = train_segmenter(
        resumed, sampler_of(study), plan_of(), accelerator=accelerator, checkpoint=checkpoint,
        progress=lambda s, _n, _t: seen.append(s), validate=score,
    )  # fmt: skip
    assert seen == [3, 4]
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert history.losses == unbroken.losses
    assert history.scores == unbroken.scores
    assert [s["step"] for s in history.scores] == [2, 4]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_the_loader_does_not_change_what_is_drawn(study: tuple[SegmentationSettings, Cohort]) -> None:
    sampler, numbers = sampler_of(study), [5, 0, 2, 7]
    direct = [sampler.batch(n) for n in numbers]
    for workers in (0, 2):
        for one, other in zip(direct, batches_ahead(sampler, numbers, workers=workers), strict=True):
            assert one.names == other.names
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.targets, other.targets)


def test_a_region_batch_holds_one_region_and_mixed_ones_several(study: tuple[SegmentationSettings, Cohort]) -> None:
    homogeneous = [set(sampler_of(study, mode="region").batch(n).regions) for n in range(6)]
    assert all(len(found) == 1 for found in homogeneous)
    assert len(set.union(*homogeneous)) == 2
    assert any(len(set(sampler_of(study).batch(n).regions)) == 2 for n in range(6))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(study: tuple[SegmentationSettings, Cohort], tmp_path: Path) -> None:
    network, checkpoint = network_of(study), tmp_path / "c.pt"
    states: list[dict[str, Tensor]] = []

    class Poisoned(PatchSampler):
        def batch(self, number: int) -> object:  # type: ignore[override]
            found = super().batch(number)
            if number == 2:
                states.append({})
                found.images[0, 0, 0, 0, 0] = math.nan
            return found

    sampler = Poisoned(**vars(sampler_of(study)))
    schedule = SCHEDULE.changed(accumulate=1)
    with pytest.raises(StepError, match=r"step 2, cases (brain|belly)\d") as caught:
        train_segmenter(network, sampler, plan_of(schedule, minutes=9), accelerator=make_accelerator("cpu", "fp32"), checkpoint=checkpoint)
    assert str(checkpoint) in str(caught.value)
    held = torch.load(checkpoint, weights_only=True)
    assert held["step"] == 2
    assert all(torch.isfinite(v).all() for v in held["weights"].values())


def test_a_patient_of_the_test_is_never_trained_on() -> None:
    parts = {("a", 0): "test", ("b", 0): "train", ("b", 1): "validation"}
    cases = [
        Case(
            Path(f"{patient}{n}.nii.gz"),
            ("liver",),
            "ct",
            other={"patient": patient} | ({"split": parts[patient, n]} if (patient, n) in parts else {}),
        )
        for patient in "abc"
        for n in range(3)
    ]
    parts = [(case.other["patient"], case.other["split"]) for case in with_split(cases, 0.0, 0)]
    assert parts == [("a", "test")] * 3 + [("b", "train"), ("b", "validation"), ("b", "validation")] + [("c", "train")] * 3


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seed"):
        read_settings(SegmentationSettings, write_study(tmp_path), seed=seed)
    with pytest.raises(InputError, match="seed"):
        read_settings(FewShotSettings, model="pack", cases="cases.jsonl", seed=seed)


def test_labels_that_go_to_another_expert_make_another_network(study: tuple[SegmentationSettings, Cohort], tmp_path: Path) -> None:
    settings, cohort = study
    regions = sorted({prompt.region for prompt in cohort.prompts.values()})
    assert len(regions) > 1
    swapped = {pair: replace(p, region=regions[1] if p.region == regions[0] else regions[0]) for pair, p in cohort.prompts.items()}
    context = StudyContext(settings, cohort, tmp_path, make_accelerator("cpu", "fp32"), silent)

    def identity(data: Cohort, *, by_region: bool) -> str:
        return context.identity(NetworkJob("any", SCHEDULE, data, ("student", "experts"), by_region=by_region))

    moved = replace(cohort, prompts=swapped)
    assert moved.keys == cohort.keys
    assert identity(moved, by_region=True) != identity(cohort, by_region=True)
    assert identity(moved, by_region=False) == identity(cohort, by_region=False)


def test_a_few_shot_network_answers_with_its_expert_where_no_region_is_named(study: tuple[SegmentationSettings, Cohort]) -> None:
    config = study[0].teacher.sizes.config()
    model = Segmenter(config, dropout=0.0)
    targets = set(expert_targets(config))
    install_experts(
        model, experts=["new"], ranks=dict.fromkeys([(name, "new") for name in targets], 2), targets=lambda name, _m: name in targets,
        scaling=1.0, base="frozen",
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    network = _TunedSegmenter(model, new_prompts(1, config.query_width, seed=0), learn_prompts=True).eval()
    pixels, rows = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(network(pixels, rows)[0], network(pixels, rows, ["liver"])[0])


def test_training_lowers_the_loss(study: tuple[SegmentationSettings, Cohort], tmp_path: Path) -> None:
    schedule = ScheduleSettings(steps=40, batch_size=2, learning_rate=1e-2)
    network, plan = network_of(study, dropout=0.0), plan_of(schedule, minutes=9)
    history = train_segmenter(network, sampler_of(study), plan, accelerator=make_accelerator("cpu", "fp32"), checkpoint=tmp_path / "c.pt")
    assert history.losses[-1]["masks"] < 0.85 * history.losses[0]["masks"]
    assert 0 <= history.waited <= history.seconds


def test_the_rate_warms_up_and_falls_to_its_final_share() -> None:
    schedule = ScheduleSettings(steps=100, learning_rate=2.0, warmup_fraction=0.1, final_share=0.25)
    rates = plan_of(schedule).in_steps()
    assert rates.rate(0, rates.steps) == pytest.approx(0.2)
    assert rates.rate(9, rates.steps) == pytest.approx(2.0)
    assert rates.rate(100, rates.steps) == pytest.approx(0.5)
