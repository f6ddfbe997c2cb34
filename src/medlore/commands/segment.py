"""`medlore segment`: text-prompted 3D segmentation of one image or of a cohort."""

from __future__ import annotations

import typer

from medlore.commands.flags import Given, Output, command
from medlore.extras import import_without
from medlore.runs.settings import setting
from medlore.segmenting.settings import SegmentSettings


class SegmentOutput(Output):
    """How the command runs and answers."""

    amp: bool = setting(True, "Half precision where the hardware supports it; --no-amp means --precision fp32.", group="Hardware")
    dry_run: bool = setting(False, "Print the plan (windows, experts, memory) and exit.", group="Run")


def segment(given: Given) -> None:
    """Segment CT, MR, PET or ultrasound volumes by the names of structures, with SAT or LoRKD weights.

    Masks return to the exact grid of each image. Research software, not a medical device.

    For example:

        medlore segment cases.jsonl --model lorkd-imbalance-nano.pth --out masks

        medlore segment --image ct.nii.gz --labels liver,spleen --modality ct --model PACK --out masks
    """
    settings, output = given.read(SegmentSettings, SegmentOutput)
    import_without("nibabel", "pydicom")  # 0.3 s for a header extension that is not looked at
    from medlore.commands.screens.segmenting import CaseProgress, print_plan, print_results
    from medlore.segmenting.cohort import plan_cases, segment_cases
    from medlore.segmenting.shards import run_folder

    if not output.amp:
        settings = settings.changed(precision="fp32")
    if output.dry_run:
        plan = plan_cases(settings)
        print_plan(plan, as_json=output.as_json)
        if any("error" in case for case in plan["cases"]):
            raise typer.Exit(1)
        return
    with CaseProgress() as progress:
        results = segment_cases(settings, watcher=progress)
    print_results(results, settings.out, as_json=output.as_json, place=run_folder(settings))
    if results["counts"]["failed"]:
        raise typer.Exit(1)


app = command(segment, SegmentSettings, SegmentOutput)
