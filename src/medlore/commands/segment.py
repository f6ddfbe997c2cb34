"""`medlore segment`: text-prompted 3D segmentation of one image or of a cohort."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

app = typer.Typer()


@app.command()
def segment(
    cases: Path | None = typer.Argument(None, help="A jsonl of cases, a folder of volumes, or one DICOM series (folder or zip)."),
    model: str = typer.Option(..., "--model", help="A pack, a published .pth file, or a shipped pack (medlore:NAME)."),
    out: Path = typer.Option(..., "--out", help="Folder for the results: one folder per image, and report.json."),
    image: Path | None = typer.Option(None, "--image", help="One image instead of a list of cases."),
    labels: str | None = typer.Option(None, "--labels", help="Names with commas, a region's name, or all."),
    modality: str | None = typer.Option(None, "--modality", help="ct, mri (also t1, t2, flair, dwi ...), pet or us."),
    region: str | None = typer.Option(None, "--region", help="This region's expert answers for every label."),
    expert_by: str = typer.Option("label", "--expert-by", help="label: each label chooses its expert; dataset: as LoRKD does."),
    allow_unknown: bool = typer.Option(False, "--allow-unknown", help="Let labels through that the vocabulary does not know."),
    orientation: str | None = typer.Option(None, "--orientation", help="Orientation in which the network sees the volume, e.g. ASR."),
    affine: str = typer.Option("auto", "--affine", help="auto, sform or qform: which NIfTI matrix to believe."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or mps."),
    amp: bool = typer.Option(True, "--amp/--no-amp", help="Half precision where the hardware has it; --no-amp is --precision fp32."),
    precision: str = typer.Option("auto", "--precision", help="auto, fp32, bf16 or fp16."),
    memory: str | None = typer.Option(None, "--memory", help="What may be used, e.g. 6GiB; four fifths of what is free by default."),
    roi_size: str | None = typer.Option(None, "--roi-size", help="Windows of another size than the model's own, e.g. 96,96,32."),
    overlap: float | None = typer.Option(None, "--overlap", help="Share that neighbouring windows have in common; 0.5 as trained."),
    sw_batch_size: int = typer.Option(1, "--sw-batch-size", help="Windows at a time."),
    max_queries: int = typer.Option(256, "--max-queries", help="Prompts decoded at a time."),
    published: bool = typer.Option(False, "--published", help="The published rules throughout: for comparisons."),
    grid: str = typer.Option("original", "--grid", help="original: the image's grid; processed: the network's."),
    resample: str = typer.Option("probability", "--resample", help="How masks return to the image's grid: probability or nearest."),
    redraw_tissues: bool = typer.Option(
        True, "--redraw-tissues/--no-redraw-tissues", help="Redraw borders of tissues by grey values, where the model names tissues."
    ),
    overlap_rule: str = typer.Option("small-over-large", "--overlap-rule", help="Label map: small-over-large, or given (later wins)."),
    image_copy: bool = typer.Option(True, "--image-copy/--no-image-copy", help="Write image.nii.gz beside the masks."),
    picture: bool = typer.Option(True, "--picture/--no-picture", help="Write quality_control.png."),
    dicom_seg: bool = typer.Option(False, "--dicom-seg", help="Write segmentation.dcm too (DICOM input, extra dicom)."),
    resume: bool = typer.Option(True, "--resume/--no-resume", help="Skip cases that are finished with the same input and settings."),
    engine: str = typer.Option("local", "--engine", help="local or ray."),
    workers: int = typer.Option(1, "--workers", help="Cases at a time; each worker holds a model."),
    prompt_embeddings: Path | None = typer.Option(None, "--prompt-embeddings", help="A table of prompts for a published file."),
    text: Path | None = typer.Option(None, "--text", help="The published text encoder, for prompts outside a table."),
    tokenizer: Path | None = typer.Option(None, "--tokenizer", help="Word list of the text encoder."),
    lora_alpha: float | None = typer.Option(None, "--lora-alpha", help="Alpha of a published file with equal ranks."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan (windows, experts, memory) and leave."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Segment CT, MR, PET or ultrasound volumes by the names of structures, with SAT or LoRKD weights.

    Masks return to the exact grid of each image. Research software, not a medical device.

    For example:

        medlore segment cases.jsonl --model lorkd-imbalance-nano.pth --out masks

        medlore segment --image ct.nii.gz --labels liver,spleen --modality ct --model PACK --out masks
    """
    from medlore.runs.settings import read_settings
    from medlore.segmenting.cohort import plan_cases, segment_cases
    from medlore.segmenting.settings import SegmentSettings

    settings = read_settings(
        SegmentSettings,
        model=model,
        out=out,
        cases=cases,
        image=image,
        labels=None if labels is None else _names(labels),
        modality=modality,
        region=region,
        expert_by=expert_by,
        allow_unknown=allow_unknown,
        orientation_code=orientation,
        affine_from=affine,
        device=device,
        precision=precision if amp else "fp32",
        memory=memory,
        roi_size=None if roi_size is None else _sizes(roi_size),
        overlap=overlap,
        sw_batch_size=sw_batch_size,
        max_queries=max_queries,
        published=published,
        grid=grid,
        resample=resample,
        redraw_tissues=redraw_tissues,
        overlap_rule=overlap_rule,
        image_copy=image_copy,
        picture=picture,
        dicom_seg=dicom_seg,
        resume=resume,
        engine=engine,
        workers=workers,
        prompt_embeddings=prompt_embeddings,
        text=text,
        tokenizer=tokenizer,
        lora_alpha=lora_alpha,
    )
    if dry_run:
        _print_plan(plan_cases(settings), as_json=as_json)
        return
    with _Progress() as progress:
        results = segment_cases(settings, watcher=progress)
    _print_results(results, settings.out, as_json=as_json)
    if results["counts"]["failed"]:
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _sizes(text: str) -> list[str]:
    return text.replace("x", ",").split(",")


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    from medlore.files import json_text

    if as_json:
        sys.stdout.write(json_text(plan) + "\n")
    else:
        sys.stdout.write(f"model: {plan['model']}\n")
        for case in plan["cases"]:
            sys.stdout.write(f"{case['name']}: {case.get('in_words') or case['error']}\n")
    if any("error" in case for case in plan["cases"]):
        raise typer.Exit(1)


def _print_results(results: dict[str, Any], out: Path, *, as_json: bool) -> None:
    from medlore.files import json_text

    if as_json:
        sys.stdout.write(json_text(results) + "\n")
        return
    counts = results["counts"]
    sys.stdout.write(f"{counts['done']} done, {counts['skipped']} skipped, {counts['failed']} failed: {out / 'report.json'}\n")


class _Progress:
    """Bars on a terminal, one line per case elsewhere; all on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._all = self._bars.add_task("cases", total=None)
        self._one = self._bars.add_task("windows", total=None)
        self._seconds: list[float] = []

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def plan(self, name: str, plan: Any) -> None:
        self._console.print(f"{name}: {plan.in_words()}")

    def window(self, name: str, done: int, total: int) -> None:
        self._bars.update(self._one, description=name, completed=done, total=total)

    def case(self, index: int, total: int, entry: dict[str, Any]) -> None:
        self._bars.update(self._all, completed=index, total=total)
        if entry["state"] != "skipped":
            self._seconds.append(entry["seconds"])
        rest = ""
        if self._seconds and index < total:
            left = sum(self._seconds) / len(self._seconds) * (total - index)
            rest = f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
        self._console.print(f"[{index}/{total}] {entry['name']}: {entry['state']} in {entry['seconds']:.1f} s{rest}")
        for line in [*entry.get("notes", ()), *([entry["error"]] if "error" in entry else [])]:
            self._console.print(f"    {line}")
