"""Few-shot tuning from top to bottom: images, backbone, ranks, method, training, one look at the test set, report."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageSet
from medlore.data.images.splits import ImageSplits, read_splits, split_images
from medlore.data.images.transforms import TrainAugmentation
from medlore.errors import InputError
from medlore.extras import is_installed
from medlore.files import made_folder
from medlore.layers.tuning.attach import added_parameters
from medlore.layers.tuning.interface import Request, Tuning
from medlore.layers.tuning.methods import install_method
from medlore.metrics.classification import classification_report
from medlore.models.backbones.reading import Backbone
from medlore.models.backbones.store import BackboneStore
from medlore.ranks.allocate import plan_ranks
from medlore.ranks.plan import RankPlan
from medlore.runs.report import Run
from medlore.training.accelerator import make_accelerator
from medlore.training.watching import Tracking, Watcher, Watchers
from medlore.tuning.examples import feature_examples, image_examples, preprocessing_of, refuse_unreadable, steps_of
from medlore.tuning.idle_settings import refuse_idle
from medlore.tuning.judging import judge
from medlore.tuning.predictions import write_predictions
from medlore.tuning.rank_tracking import RankTracking, plot_tracked
from medlore.tuning.result import FinetuneResult
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import Examples, Trainer, TuningHistory
from medlore.tuning.tuned import save_tuned


@dataclass
class _Prepared:
    """All that is known before the first step."""

    splits: ImageSplits
    backbone: Backbone
    plan: RankPlan | None
    tuning: Tuning
    train: Examples
    validation: Examples | None
    steps: int
    tracking: RankTracking | None
    description: dict[str, Any]
    head_parameters: int
    added_parameters: int
    notes: list[str] = field(default_factory=list)


def finetune(
    settings: FinetuneSettings,
    out: str | Path | None = None,
    *,
    train: ImageSet | None = None,
    validation: ImageSet | None = None,
    test: ImageSet | None = None,
    resume: bool = False,
    watcher: Watcher | None = None,
    backbones: BackboneStore | None = None,
) -> FinetuneResult:
    """Tune a backbone on a few labelled images and measure it once on the test images.

    Args:
        settings: what to do.
        out: folder of the outputs; None writes nothing and keeps everything in memory.
        train: images in memory in place of `settings.data`. Given with `settings.shots`, shots are drawn from it, and what is
            left selects; without, all of it trains.
        validation: images that choose the epoch.
        test: images that judge; looked at once, after everything is decided. Missing, a share of `train` is held out
            unless `settings.test_fraction` is 0.
        resume: go on from the last epoch that an earlier, killed run with the same settings finished.
        watcher: hears of every step, epoch and note, on the main process.
        backbones: shared by several runs of this process, so that a backbone is read and prepared once; None reads it.

    Raises:
        InputError: wrong settings or data; nothing was trained.
        StepError: the loss is not finite, or a file cannot be written.

    Source: recipe of Zhang, Wang and Gu, ICCV 2025, section 4.1 (AdamW, cosine, batch 4, 20 epochs), with selection on
    validation images alone.
    """
    refuse_idle(settings)
    folder = None if out is None else Path(out)
    _check_resume(settings, folder, resume=resume)
    accelerator = make_accelerator(
        settings.run.device, settings.run.precision, folder if settings.run.track != "none" else None, track=settings.run.track
    )
    splits = _splits(settings, train, validation, test)
    if folder is not None:
        made_folder(folder)
    with _run(settings, folder, accelerator) as run:
        prepared = _prepare(settings, splits, accelerator, backbones or BackboneStore())
        history = _train(settings, prepared, folder, accelerator, resume=resume, watcher=watcher or Watcher())
        result = _conclude(settings, prepared, history, folder, accelerator)
        if run is not None and folder is not None:
            _write_outputs(run, folder, prepared, result)
    return result


def dry_run(settings: FinetuneSettings) -> dict[str, Any]:
    """What a run would do: settings, sizes of the parts, parameters, steps; nothing is trained or written."""
    refuse_idle(settings)
    accelerator = make_accelerator(settings.run.device, settings.run.precision, None)
    prepared = _prepare(settings, _splits(settings, None, None, None), accelerator, BackboneStore())
    return {
        "settings": settings.model_dump(mode="json"),
        "learning_rate": settings.schedule().learning_rate,
        **_facts(settings, prepared),
    }


def _check_resume(settings: FinetuneSettings, folder: Path | None, *, resume: bool) -> None:
    if resume and (folder is None or not settings.run.checkpoints):
        came = "no output folder" if folder is None else "given with --no-checkpoints"
        raise InputError("--resume", came, "a run that writes checkpoints into its folder", "give --out, and no --no-checkpoints")


def _splits(settings: FinetuneSettings, train: ImageSet | None, validation: ImageSet | None, test: ImageSet | None) -> ImageSplits:
    if train is not None:
        in_memory = ImageSplits(train, validation, test)
        if settings.parts.shots is None and (validation is not None or test is not None):
            return in_memory
        return split_images(train, settings.parts.rules(), validation=validation, test=test)
    if settings.dataset.data is None:
        raise InputError("--data", "nothing", "an image folder, list, table, .npz or .zip", "name the labelled images")
    how = settings.dataset.flat()
    return read_splits(how.pop("data"), settings.parts.rules(), official=settings.parts.official_draw, **how)


def _prepare(settings: FinetuneSettings, splits: ImageSplits, accelerator: Any, backbones: BackboneStore) -> _Prepared:
    _check_labels(splits)
    _check_groups(settings, splits)
    refuse_unreadable(splits.train, splits.validation, splits.test)
    classes = len(splits.train.classes)
    chosen = settings.backbone.flat()
    backbone = backbones.load(chosen.pop("model"), classes=classes, seed=settings.training.seed, **chosen)
    plan = _plan_once(settings, backbone, backbones)
    preprocessing = preprocessing_of(backbone)
    changes = settings.augmentation.flat()
    augmentation = None
    if changes.pop("augment") and settings.way().augments:
        augmentation = TrainAugmentation(preprocessing, seed=settings.training.seed + accelerator.process_index, **changes)
    train = image_examples(splits.train, preprocessing, augmentation=augmentation)
    validation = None if splits.validation is None else image_examples(splits.validation, preprocessing)
    steps = steps_of(len(train), settings.training.batch_size, settings.training.epochs)
    backbone.model.to(accelerator.device)
    request = Request(
        head=backbone.head_name,
        sample=train.inputs(np.arange(1), step=None).to(accelerator.device),
        plan=plan,
        seed=settings.training.seed,
        steps=steps,
        options=settings.given_options(),
        **settings.factors.flat(),
        batches=lambda: _look(train, accelerator.device),
    )
    tracking = _tracking(settings, backbone, plan)
    description, head_parameters = backbone.describe(), sum(p.numel() for p in backbone.head().parameters())
    tuning = install_method(settings.method, backbone.model, request)
    if tracking is not None:
        tracking.follow(tuning.model)
    return _Prepared(
        splits,
        backbone,
        plan,
        tuning,
        train,
        validation,
        steps,
        tracking,
        description,
        head_parameters,
        added_parameters(tuning.model) or (0 if plan is None else plan.parameters),
        [*splits.notes, *backbone.notes, *tuning.notes, *_about_patience(settings, splits)],
    )


def _about_patience(settings: FinetuneSettings, splits: ImageSplits) -> list[str]:
    return ["no validation images: --patience cannot stop the run"] if settings.training.patience and splits.validation is None else []


def _tracking(settings: FinetuneSettings, backbone: Backbone, plan: RankPlan | None) -> RankTracking | None:
    """Follows the planned layers; methods without a plan are followed on the same targets."""
    if not settings.run.track_stable_rank:
        return None
    followed = plan or plan_ranks(backbone.model, targets=settings.allocation.targets, rule="uniform:1")
    return RankTracking(backbone.model, [layer.name for layer in followed.layers])


def _plan_once(settings: FinetuneSettings, backbone: Backbone, backbones: BackboneStore) -> RankPlan | None:
    """`choose_plan`, asked once for a backbone and what it depends on; plans and lists from files are read anew."""
    wanted = settings.allocation
    from_file = wanted.plan is not None or wanted.ranks is not None
    key = (settings.method, settings.training.seed, settings.method_options(), *wanted.flat().values())
    store = BackboneStore() if from_file else backbones
    return store.once(backbone, key, lambda: choose_plan(settings, backbone))


def choose_plan(settings: FinetuneSettings, backbone: Backbone) -> RankPlan | None:
    """The ranks of a run: a plan or a list from a file, stable ranks, or one rank.

    `rank: equal` is the one rank whose factors have about as many parameters as those of the stable ranks.

    Raises:
        TargetError: a plan for other weights, or a model without such targets.
    """
    method, wanted = settings.way(), settings.allocation
    if method.rule is None:
        return None
    if wanted.plan is not None:
        return RankPlan.load(wanted.plan).for_model(backbone.model)
    alpha = wanted.alpha or method.alpha

    def planned(rule: str, scale: float = 1.0, budget: str | None = None) -> RankPlan:
        return plan_ranks(
            backbone.model,
            targets=wanted.targets,
            granularity=wanted.granularity,
            rule=rule,
            ranks=wanted.ranks if rule == "given" else None,
            scale=scale,
            budget=budget,
            alpha=alpha,
            seed=settings.training.seed,
        )

    if wanted.ranks is not None:
        return planned("given")
    if method.rule == "stable-rank":
        return planned("stable-rank", wanted.scale, wanted.budget)
    if wanted.rank == "equal":
        pairs = method.pairs(settings.method_options())  # that share the parameters of one
        return planned(f"uniform:{pairs * max(1, round(planned('stable-rank', wanted.scale, wanted.budget).uniform_rank))}")
    return planned(f"uniform:{wanted.rank}")


def _train(
    settings: FinetuneSettings, prepared: _Prepared, folder: Path | None, accelerator: Any, *, resume: bool, watcher: Watcher
) -> TuningHistory:
    tuning, train, validation = prepared.tuning, prepared.train, prepared.validation
    if tuning.head_only:
        head = prepared.backbone.head_name
        train = feature_examples(train, tuning.model, head, accelerator=accelerator)
        validation = None if validation is None else feature_examples(validation, tuning.model, head, accelerator=accelerator)
        tuning = Tuning(tuning.model.get_submodule(head), tuning.form, tuning.save, tuning.merged)
    watchers = [watcher] if accelerator.is_main_process else []
    if prepared.tracking is not None:
        watchers.append(prepared.tracking)
    if settings.run.track != "none":
        accelerator.init_trackers("finetune")
        watchers.append(Tracking(accelerator))
    checkpoint = folder / "checkpoint.pt" if folder is not None and settings.run.checkpoints else None
    everyone = Watchers(watchers)
    if resume and checkpoint is not None and not checkpoint.is_file():
        everyone.note(f"no checkpoint in {folder}: starting from the beginning")
    trainer = Trainer(
        tuning=tuning,
        task=prepared.splits.train.task,
        schedule=settings.schedule(),
        accelerator=accelerator,
        judge=_judge(prepared.splits.train),
        watcher=everyone,
        checkpoint=checkpoint,
        fingerprint=_fingerprint(settings, prepared, accelerator.num_processes),
    )
    everyone.start(prepared.steps, settings.training.epochs)
    try:
        history = trainer.fit(train, validation, resume=resume)
    finally:
        everyone.stop()
    if settings.run.track != "none":
        accelerator.end_training()
    return history


def _conclude(
    settings: FinetuneSettings, prepared: _Prepared, history: TuningHistory, folder: Path | None, accelerator: Any
) -> FinetuneResult:
    """Save what was learnt, merge it, look at the test images once."""
    tuning, backbone, splits = prepared.tuning, prepared.backbone, prepared.splits
    facts = _facts(settings, prepared)
    written = None
    if folder is not None and accelerator.is_main_process:
        names = splits.train.classes
        written = save_tuned(
            tuning, folder, backbone=backbone, method=settings.method, classes=names, task=splits.train.task, heads=settings.backbone.heads
        )
    model = tuning.merged().eval()
    if prepared.tracking is not None:
        facts["stable_rank"] = prepared.tracking.weights
    report = facts | {"best_epoch": history.best_epoch, "stopped": history.stopped, "history": history.epochs}
    scores, targets, metrics = None, None, dict[str, float | None]()
    if splits.test is not None:
        found = judge(model, backbone, splits.test, settings=settings, accelerator=accelerator)
        report["test"], metrics, scores, targets = found.report, found.metrics, found.scores, found.targets
    return FinetuneResult(metrics, report, history, scores, targets, model, backbone, prepared.plan, written)


def _write_outputs(run: Run, folder: Path, prepared: _Prepared, result: FinetuneResult) -> None:
    from medlore.tuning.curves import plot_curves

    run.results.update(result.report)
    if result.folder is not None:
        run.add_output("tuned", result.folder)
    if result.plan is not None:
        run.add_output("plan", result.plan.save(folder / "plan.json"))
    if result.scores is not None and prepared.splits.test is not None:
        run.add_output("predictions", write_predictions(folder / "predictions.csv", prepared.splits.test, result.scores))
    drawn = is_installed("matplotlib")  # extra `plots`
    if drawn:
        run.add_output("curves", plot_curves(result.history, folder / "curves.png", score_name=score_name(prepared.splits.train)))
    if drawn and prepared.tracking is not None:
        plotted = plot_tracked(prepared.tracking.weights, result.history.epochs, folder / "stable_ranks.png")
        run.add_output("stable_ranks", plotted)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


@contextlib.contextmanager
def _run(settings: FinetuneSettings, folder: Path | None, accelerator: Any) -> Iterator[Run | None]:
    """The report of this run; only the main process of a distributed run writes one."""
    if folder is None or not accelerator.is_main_process:
        yield None
        return
    with Run("finetune", folder, settings=settings, seed=settings.training.seed, device=str(accelerator.device)) as run:
        data = settings.dataset.data
        if data is not None and data.is_file():
            run.add_input(data)
        yield run


def _facts(settings: FinetuneSettings, prepared: _Prepared) -> dict[str, Any]:
    model = prepared.tuning.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = prepared.added_parameters
    parts = {"train": prepared.splits.train, "validation": prepared.splits.validation, "test": prepared.splits.test}
    return {
        "method": settings.method,
        "backbone": prepared.description,
        "classes": prepared.splits.train.classes,
        "task": prepared.splits.train.task,
        "selection": score_name(prepared.splits.train) if prepared.validation is not None else None,
        "data": {name: _about(part) for name, part in parts.items()},
        "trainable_parameters": trained,
        "head_parameters": prepared.head_parameters,
        "total_parameters": prepared.description["parameters"] + added,
        "factor_parameters": None if prepared.plan is None else added,
        "ranks": None if prepared.plan is None else {layer.name: layer.rank for layer in prepared.plan.layers},
        "steps": prepared.steps,
        "learning_rate": settings.schedule().learning_rate,
        "notes": prepared.notes,
    }


def _about(part: ImageSet | None) -> dict[str, Any] | None:
    if part is None:
        return None
    return {"name": part.name, "source": part.source, "images": len(part), "counts": part.counts(), "sha256": content_hash(part)}


def content_hash(part: ImageSet) -> str:
    """Hash of names and labels: two runs with the same one saw the same images."""
    lines = [f"{item.key}\t{','.join(map(str, item.labels))}" for item in part.items]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _fingerprint(settings: FinetuneSettings, prepared: _Prepared, processes: int) -> str:
    """What must be the same for a checkpoint to be continued."""
    facts = settings.decisive()
    facts["weights"] = prepared.backbone.sha256
    facts["train"] = content_hash(prepared.splits.train)
    facts["validation"] = None if prepared.splits.validation is None else content_hash(prepared.splits.validation)
    facts["processes"] = processes  # each takes its own draws
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_labels(splits: ImageSplits) -> None:
    for part in (splits.train, splits.validation, splits.test):
        if part is not None:
            part.targets()  # names every image without a label
    if len(splits.train.classes) < 2 and splits.train.task == "single":
        raise InputError("--data", f"{len(splits.train.classes)} class", "at least two classes", "add a class folder or a label column")


def _check_groups(settings: FinetuneSettings, splits: ImageSplits) -> None:
    parts = [part for part in (splits.train, splits.validation) if part is not None]
    if settings.parts.per == "group" and not any(group is not None for part in parts for group in part.groups):
        raise InputError(
            "--per", "'group', but no image has a patient or study", "data that names them", "give --group-pattern, or take --per image"
        )


def score_name(images: ImageSet) -> str:
    """What selects the epoch on validation images."""
    return "balanced_accuracy" if images.task == "single" else "macro_auc"


def _judge(images: ImageSet) -> Any:
    name = score_name(images)

    def judge(targets: NDArray[Any], scores: NDArray[np.float32]) -> float:
        report = classification_report(targets, scores, classes=images.classes, task=images.task, bootstrap=0)
        value = report["metrics"][name]["value"]
        return float("nan") if value is None else float(value)

    return judge


def _look(train: Examples, device: Any, *, batch_size: int = 16, most: int = 8) -> list[torch.Tensor]:
    """A few training batches as they are, for methods that look at the data."""
    starts = range(0, min(len(train), batch_size * most), batch_size)
    return [train.inputs(np.arange(s, min(s + batch_size, len(train))), step=None).to(device) for s in starts]


__all__ = ["FinetuneResult", "FinetuneSettings", "choose_plan", "dry_run", "finetune"]
