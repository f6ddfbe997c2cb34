"""`medlore evaluate`: measure a tuned model on labelled images, or masks against true masks."""

from __future__ import annotations

from pathlib import Path

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import setting
from medlore.segmenting.settings import MaskEvaluationSettings
from medlore.tuning.scoring_settings import EvaluateSettings


class EvaluateOutput(Output):
    """Where the numbers go."""

    out: Path | None = setting(None, "Folder for report.json and predictions.csv.")
    overwrite: bool = setting(False, "Replace a finished run of other settings in --out.")


def evaluate(given: Given) -> None:
    """Evaluate a tuned model on labelled images; with --pred and --truth, compare masks with the reference masks of a case list."""
    from medlore.errors import InputError

    masks = [given.names(name) for name in ("pred", "truth")]
    if any(masks):
        if not all(masks) or given.names("tuned") or given.names("data"):
            raise InputError("evaluate", "only one of --pred and --truth, or images too", "both of them alone", "give --pred and --truth")
        _evaluate_masks(given)
        return
    if not (given.names("tuned") and given.names("data")):
        raise InputError("evaluate", "no model or no --data", "RUN --data SET, or --pred DIR --truth cases.jsonl", "name both")
    settings, output = given.read(EvaluateSettings, EvaluateOutput, foreign="applies only to masks (--pred, --truth)")
    from medlore.commands.screens.answers import print_json
    from medlore.commands.screens.tuning import print_report, print_verdict
    from medlore.runs.report import refuse_finished
    from medlore.tuning.evaluate import evaluate as measure

    if output.out is not None:
        refuse_finished(output.out, overwrite=output.overwrite, settings=settings)
    result = measure(settings, output.out)
    if output.as_json:
        print_json({**result.report, "verdict": result.verdict, "probe": result.probe, "trained_on_images": result.seen})
    else:
        print_report(result.report, title=f"{result.images.name}: {len(result.images)} images", probe=result.probe)
        print_verdict(result.verdict)


def _evaluate_masks(given: Given) -> None:
    settings, output = given.read(MaskEvaluationSettings, EvaluateOutput, foreign="applies only to images (RUN --data SET)")
    from medlore.commands.screens.masks import print_masks
    from medlore.runs.report import refuse_finished
    from medlore.segmenting.evaluate import evaluate_masks

    out = output.out if output.out is not None else settings.pred / "evaluation"
    refuse_finished(out, overwrite=output.overwrite, settings=settings)
    evaluate_masks(
        settings.pred,
        settings.truth,
        out=out,
        tolerance_mm=settings.tolerance_mm,
        show=lambda results: print_masks(results, as_json=output.as_json),
    )


app = command(evaluate, EvaluateSettings, MaskEvaluationSettings, EvaluateOutput)
