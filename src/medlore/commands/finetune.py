"""`medlore finetune`: tune a pre-trained network on a few labelled images, or a segmenter on about five masks."""

from __future__ import annotations

import contextlib
from pathlib import Path

from medlore.commands.flags import Given, Output, command
from medlore.decomposing.segmenters.few_shot_settings import GROUP, FewShotSettings
from medlore.runs.settings import setting
from medlore.tuning.settings import FinetuneSettings

_RUN = "Run"


class FinetuneOutput(Output):
    """Where a run writes, and how it goes."""

    pack: str | None = setting(None, "Pack or file of a segmenter to be tuned on --cases; omit it to tune on images.", argument="PACK")
    out: Path | None = setting(None, "Output folder; default the next free runs/NAME-NUMBER.", group=_RUN)
    overwrite: bool = setting(False, "Replace a finished run in --out.", group=_RUN)
    dry_run: bool = setting(False, "Print settings, sizes and parameters; train nothing.", group=_RUN)


class ImagesOutput(FinetuneOutput):
    """Of a run on images."""

    resume: bool = setting(False, "Continue an interrupted run after its last finished epoch.", group=_RUN)
    compare: tuple[str, ...] | None = setting(
        None, "Methods that are run on the same images, in place of --method; prints one table.", group="Method and ranks"
    )


def finetune(given: Given) -> None:
    """Tune a pre-trained network on a few labelled images, or a segmenter on about five masks.

    Every method starts at the logistic regression on the frozen features, which stands beside its result; test images are measured once.
    With PACK and --cases it is a segmenter that is tuned.
    """
    if given.names("pack") or given.names("cases"):
        _tune_segmenter(given)
        return
    settings, output = given.read(FinetuneSettings, ImagesOutput, foreign=f"is for segmenters ({GROUP.partition(': ')[2]})")
    from medlore.commands.screens.answers import print_json
    from medlore.commands.screens.progress import ProgressBar
    from medlore.commands.screens.tuning import print_facts, print_result, print_where
    from medlore.runs.report import next_run, refuse_finished
    from medlore.training.accelerator import is_main_process
    from medlore.tuning.finetune import dry_run
    from medlore.tuning.finetune import finetune as tune

    if output.compare is not None:
        _compare(settings, output)
        return
    if output.dry_run:
        facts = dry_run(settings)
        if output.as_json:
            print_json(facts)
        else:
            print_facts(facts)
        return
    with contextlib.ExitStack() as stack:
        out = output.out
        if out is not None:
            refuse_finished(out, overwrite=output.overwrite, settings=settings if output.resume else None)
        elif settings.dataset.data is not None and not output.resume:
            out = stack.enter_context(next_run(f"{settings.dataset.data.resolve().stem}-{settings.method}"))
            print_where(out)
        result = tune(settings, out, resume=output.resume, watcher=ProgressBar(enabled=not output.as_json))
    if not is_main_process():
        return
    if output.as_json:
        print_json({"out": out, "metrics": result.metrics, **result.report})
    else:
        print_result(result.report, out)


def _compare(settings: FinetuneSettings, output: ImagesOutput) -> None:
    from medlore.commands.screens.answers import print_json
    from medlore.commands.screens.progress import ProgressBar
    from medlore.commands.screens.tuning import print_side_by_side, print_where
    from medlore.errors import InputError
    from medlore.runs.report import next_run, refuse_finished
    from medlore.tuning.side_by_side import compare_methods, known_methods

    faults = [flag for flag, given in (("--resume", output.resume), ("--dry-run", output.dry_run)) if given]
    faults += ["--method"] if "method" in settings.stated() else []
    if faults:
        raise InputError(", ".join(faults), "given with --compare", "--compare alone", "leave it out")
    names = known_methods(output.compare or ())
    with contextlib.ExitStack() as stack:
        out = output.out
        if out is not None:
            refuse_finished(out, overwrite=output.overwrite)
        elif settings.dataset.data is not None:
            out = stack.enter_context(next_run(f"{settings.dataset.data.resolve().stem}-compared"))
            print_where(out)
        found = compare_methods(settings, names, out, watcher=ProgressBar(enabled=not output.as_json))
    if output.as_json:
        print_json({"out": out, **vars(found)})
    else:
        print_side_by_side(found, out)


def _tune_segmenter(given: Given) -> None:
    from medlore.errors import InputError

    if "pack" in given.values and "model" in given.values:
        raise InputError("PACK, --model", "both", "one of them", "leave --model out")
    if "pack" in given.values:
        given = given.without(model=given.values["pack"])
    if "augment" in given.values:  # the one word of images that means the same for patches
        given = given.without("augment", patches={"augment": given.values["augment"]})
    settings, output = given.read(FewShotSettings, FinetuneOutput, foreign="is for images: given for a segmenter")
    from medlore.commands.screens.tuning import print_where
    from medlore.commands.screens.tuning_segmenters import plan_on_screen, tune_on_screen
    from medlore.runs.report import next_run, refuse_finished

    if output.dry_run:
        plan_on_screen(settings, as_json=output.as_json)
        return
    with contextlib.ExitStack() as stack:
        if (out := output.out) is None:
            out = stack.enter_context(next_run(f"{settings.cases.stem}-{settings.method}"))
            print_where(out)
        else:
            refuse_finished(out, overwrite=output.overwrite, settings=settings)
        tune_on_screen(settings, out, as_json=output.as_json)


app = command(finetune, FinetuneSettings, FewShotSettings, ImagesOutput, config=("--config", "--settings"))
