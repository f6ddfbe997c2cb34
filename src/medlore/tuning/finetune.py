"""Few-shot tuning from top to bottom: images, backbone, ranks, method, training, one look at the test set, report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlore.data.images.imageset import ImageSet
from medlore.data.images.splits import ImageSplits, read_splits, split_images
from medlore.errors import InputError
from medlore.extras import is_installed
from medlore.files import made_folder
from medlore.models.backbones.store import BackboneStore
from medlore.runs.report import Run
from medlore.training.accelerator import make_accelerator
from medlore.training.watching import Tracking, Watcher, Watchers
from medlore.tuning.choosing import candidates_of
from medlore.tuning.chosen import CHOICE_FILE, chosen_once
from medlore.tuning.examples import preprocessing_of
from medlore.tuning.facts import content_hash, facts_of, score_name
from medlore.tuning.fitting import fit
from medlore.tuning.idle_settings import refuse_idle
from medlore.tuning.judging import judge
from medlore.tuning.plans import choose_plan
from medlore.tuning.predictions import write_predictions
from medlore.tuning.preparing import Prepared, Workshop, check_parts, prepare
from medlore.tuning.probing import Reading, all_labels
from medlore.tuning.rank_tracking import plot_tracked
from medlore.tuning.reference import compared, reference_of
from medlore.tuning.result import FinetuneResult
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.trained_on import write_trained_on
from medlore.tuning.training import TuningHistory
from medlore.tuning.tuned import save_tuned
from medlore.tuning.verdict import verdict_of

CHECKPOINTS = ("checkpoint.pt", "refit.pt")


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
        validation: images that choose the epoch; afterwards they are trained on too, unless `settings.refit` is off.
        test: images that judge; looked at once, after everything is decided. Missing, a share of `train` is held out
            unless `settings.test_fraction` is 0.
        resume: go on from the last epoch that an earlier, killed run with the same settings finished.
        watcher: hears of every step, epoch and note, on the main process.
        backbones: shared by several runs of this process, so that a backbone is read, and its features are computed, once; None reads it.

    Raises:
        InputError: wrong settings or data; nothing was trained.
        StepError: the loss is not finite, or a file cannot be written.

    Source: a linear probe first, then everything from there (Kumar et al., ICLR 2022); with `start="random"` the recipe of Zhang, Wang
    and Gu, ICCV 2025, section 4.1 (AdamW, cosine, batch 4, 20 epochs), with selection on validation images alone.
    """
    refuse_idle(settings)
    folder = None if out is None else Path(out)
    _check_resume(settings, folder, resume=resume)
    tracked = folder if settings.run.track != "none" else None
    accelerator = make_accelerator(settings.run.device, settings.run.precision, tracked, track=settings.run.track)
    workshop = Workshop(accelerator, backbones or BackboneStore())
    splits = splits_of(settings, train, validation, test)
    if folder is not None:
        made_folder(folder)
    with _run(settings, folder, accelerator) as run:
        check_parts(settings, splits)
        everyone = _watchers(settings, workshop, watcher)
        choice = chosen_once(settings, splits, folder, workshop, resume=resume, watcher=everyone)
        settings, splits = (settings, splits) if choice is None else (choice.settings, choice.splits)
        fitted = _fitted(
            settings, splits, folder, workshop, resume=resume, watcher=everyone, reading=None if choice is None else choice.reading
        )
        result = _conclude(settings, fitted, splits, folder, workshop)
        result.report |= {} if choice is None else {"choice": choice.report}
        if run is not None and folder is not None:
            _write_outputs(run, folder, fitted.prepared, splits, result)
    return result


def dry_run(settings: FinetuneSettings) -> dict[str, Any]:
    """What a run would do: settings, sizes of the parts, parameters, steps; nothing is trained or written.

    Where the shots choose, it is what the largest candidate would do.
    """
    refuse_idle(settings)
    splits = splits_of(settings, None, None, None)
    check_parts(settings, splits)
    workshop = Workshop(make_accelerator(settings.run.device, settings.run.precision, None))
    if settings.chosen_on_shots():
        settings = candidates_of(settings, len(splits.train))[-1].settings
    prepared = prepare(settings, splits.train, splits.validation, workshop)
    notes = [*splits.notes, *prepared.notes]
    return {"settings": settings.model_dump(mode="json"), **facts_of(settings, prepared, splits), "notes": notes}


def _check_resume(settings: FinetuneSettings, folder: Path | None, *, resume: bool) -> None:
    if resume and (folder is None or not settings.run.checkpoints):
        came = "no output folder" if folder is None else "given with --no-checkpoints"
        raise InputError("--resume", came, "a run that writes checkpoints into its folder", "give --out, and no --no-checkpoints")


def splits_of(settings: FinetuneSettings, train: ImageSet | None, validation: ImageSet | None, test: ImageSet | None) -> ImageSplits:
    """The parts of a run: those in memory, or those of `settings.data`."""
    if train is not None:
        in_memory = ImageSplits(train, validation, test)
        if settings.parts.shots is None and (validation is not None or test is not None):
            return in_memory
        return split_images(train, settings.parts.rules(), validation=validation, test=test)
    if settings.dataset.data is None:
        raise InputError("--data", "nothing", "an image folder, list, table, .npz or .zip", "name the labelled images")
    how = settings.dataset.flat()
    return read_splits(how.pop("data"), settings.parts.rules(), official=settings.parts.official_draw, **how)


@dataclass
class _Fitted:
    """What training left.

    Attributes:
        prepared: of the training whose network is kept.
        history: of the training that chose the length.
        refit: of the training on all labels, where there was one.
    """

    prepared: Prepared
    history: TuningHistory
    refit: TuningHistory | None = None


def _watchers(settings: FinetuneSettings, workshop: Workshop, watcher: Watcher | None) -> Watchers:
    watchers = [watcher] if watcher is not None and workshop.accelerator.is_main_process else []
    if settings.run.track != "none":
        workshop.accelerator.init_trackers("finetune")
        watchers.append(Tracking(workshop.accelerator))
    return Watchers(watchers)


def _fitted(
    settings: FinetuneSettings,
    splits: ImageSplits,
    folder: Path | None,
    workshop: Workshop,
    *,
    resume: bool,
    watcher: Watcher,
    reading: Reading | None,
) -> _Fitted:
    """Train; where images chose the length, train again on them too, for the length that they chose."""
    accelerator, everyone = workshop.accelerator, watcher
    places = [folder / name if folder is not None and settings.run.checkpoints else None for name in CHECKPOINTS]
    if resume and places[0] is not None and not places[0].is_file():
        everyone.note(f"no checkpoint in {folder}: starting from the beginning")
    prepared = prepare(settings, splits.train, splits.validation, workshop, reading=reading)
    history = fit(settings, prepared, places[0], accelerator, resume=resume, watcher=everyone)
    fitted = _Fitted(prepared, history)
    if splits.validation is not None and settings.training.refit:
        images = all_labels([splits.train, splits.validation])
        steps = history.best_epoch * max(1, prepared.steps // settings.passes(len(splits.train)))
        again = settings.changed(steps=steps, epochs=None, patience=None)
        prepared = prepare(again, images, None, workshop, reading=prepared.reading)
        everyone.note(f"training again on all {len(images)} labelled images, for the length that the validation images chose")
        fitted = _Fitted(prepared, history, fit(again, prepared, places[1], accelerator, resume=resume, watcher=everyone))
    if settings.run.track != "none":
        accelerator.end_training()
    return fitted


def _conclude(settings: FinetuneSettings, fitted: _Fitted, splits: ImageSplits, folder: Path | None, workshop: Workshop) -> FinetuneResult:
    """Save what was learnt, merge it, look at the test images once."""
    prepared, history, accelerator = fitted.prepared, fitted.history, workshop.accelerator
    tuning, backbone = prepared.tuning, prepared.backbone
    facts = facts_of(settings, prepared, splits) | {"notes": [*splits.notes, *prepared.notes]}
    given = all_labels([splits.train, splits.validation])
    written = None
    if folder is not None and accelerator.is_main_process:
        written = save_tuned(
            tuning,
            folder,
            backbone=backbone,
            method=settings.method,
            classes=splits.train.classes,
            task=splits.train.task,
            heads=settings.backbone.heads,
            cut=prepared.cut,
        )
        write_trained_on(written, given, preprocessing_of(backbone))
    model = tuning.merged().eval()
    if prepared.tracking is not None:
        facts["stable_rank"] = prepared.tracking.weights
    report = facts | {"best_epoch": history.best_epoch, "stopped": history.stopped, "history": history.epochs}
    if fitted.refit is not None:
        report["refit"] = {"images": len(prepared.images), "steps": prepared.steps, "history": fitted.refit.epochs}
    solved = prepared.probe if prepared.images is given or fitted.refit is not None else None
    reference = reference_of(settings, prepared.reading, given, workshop, solved)
    if written is not None:
        reference.save(written)
    scores, targets, metrics = None, None, dict[str, float | None]()
    if splits.test is not None:
        found = judge(model, backbone, splits.test, settings=settings, accelerator=accelerator)
        report["test"], metrics, scores, targets = found.report, found.metrics, found.scores, found.targets
        strength = {"labels": reference.probe.images, "views": reference.probe.views, "strength": reference.probe.choice.strength}
        report["probe"] = compared(
            splits.test, scores, reference.ask(splits.test), seed=settings.training.seed, bootstrap=settings.run.bootstrap, **strength
        )
        report["verdict"] = verdict_of(found.report, report["probe"], is_reference=prepared.is_solved)
    return FinetuneResult(metrics, report, history, scores, targets, model, backbone, prepared.plan, written, reference)


def _write_outputs(run: Run, folder: Path, prepared: Prepared, splits: ImageSplits, result: FinetuneResult) -> None:
    from medlore.tuning.curves import plot_curves

    run.results.update(result.report)
    if result.folder is not None:
        run.add_output("tuned", result.folder)
    if result.plan is not None:
        run.add_output("plan", result.plan.save(folder / "plan.json"))
    if result.scores is not None and splits.test is not None:
        run.add_output("predictions", write_predictions(folder / "predictions.csv", splits.test, result.scores))
    drawn = is_installed("matplotlib")  # extra `plots`
    if drawn:
        run.add_output("curves", plot_curves(result.history, folder / "curves.png", score_name=score_name(splits.train)))
    if drawn and prepared.tracking is not None:
        plotted = plot_tracked(prepared.tracking.weights, result.history.epochs, folder / "stable_ranks.png")
        run.add_output("stable_ranks", plotted)
    for name in (*CHECKPOINTS, CHOICE_FILE):
        (folder / name).unlink(missing_ok=True)


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


__all__ = ["FinetuneResult", "FinetuneSettings", "choose_plan", "content_hash", "dry_run", "finetune"]
