"""`medlore segment`: text-prompted segmentation of a cohort, on the grid of each image, in bounded memory.

The model is loaded once. Each case is planned from its header, segmented, and written as one folder that is whole or
absent; a case that fails is reported and the others go on; a second run skips what is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from medlore.data.formats import ReadOptions, content_hash, existing_image, read_grid
from medlore.data.volumes.cases import Case, folder_names, only_known_faults
from medlore.data.volumes.geometry import check_orientation
from medlore.errors import DataError, InputError, MedloreError
from medlore.files import read_json, refuse_strangers, sha256_of
from medlore.models.segmenter.vocabulary import canonical_modality, default_vocabulary
from medlore.runs.hardware import Hardware, Work, decide_hardware
from medlore.runs.journal import append_line
from medlore.runs.report import Run
from medlore.runs.workers import spread
from medlore.segmenting.brain_mask import read_brain_mask, refuse_flags_together
from medlore.segmenting.case_folders import folder_for
from medlore.segmenting.collecting import collect_cases
from medlore.segmenting.labels import ModelFacts, Routes, facts_of_bundle, facts_of_pack, route_labels
from medlore.segmenting.mask_formats import formats_named
from medlore.segmenting.plan import CasePlan
from medlore.segmenting.planner import Choices, Planner
from medlore.segmenting.settings import RULES_VERSION, SegmentSettings
from medlore.segmenting.shards import part_of, run_folder, shard_record, totals
from medlore.segmenting.statistics import write_cohort_table

if TYPE_CHECKING:
    from medlore.data.volumes.nifti import Volume
    from medlore.data.volumes.nifti_affine import AffineChoice
    from medlore.data.volumes.reference import ReferenceSeries
    from medlore.segmenting.model import SegmentingModel
    from medlore.segmenting.outputs import Wanted

State = Literal["done", "skipped", "failed"]
JOURNAL = "report.cases.jsonl"  # the entries of a run that goes on, or was killed


class CohortWatcher(Protocol):
    """Receives the progress of a run."""

    def plan(self, name: str, plan: CasePlan) -> None:
        """A case was planned."""

    def window(self, name: str, done: int, total: int) -> None:
        """Windows of a case were done."""

    def case(self, index: int, total: int, entry: dict[str, Any]) -> None:
        """A case was finished, skipped, or failed."""


class Silence:
    """A watcher that says nothing."""

    def plan(self, name: str, plan: CasePlan) -> None:
        """Nothing."""

    def window(self, name: str, done: int, total: int) -> None:
        """Nothing."""

    def case(self, index: int, total: int, entry: dict[str, Any]) -> None:
        """Nothing."""


def segment_cases(settings: SegmentSettings, *, watcher: CohortWatcher | None = None) -> dict[str, Any]:
    """Segment a cohort; returns what `report.json` says under `results`.

    Raises:
        InputError: wrong use; nothing was written.
        StepError: the output folder cannot be written. Cases that fail do not raise: their state says so.
    """
    watcher = watcher or Silence()
    cases = collect_cases(settings)
    names = folder_names(cases)
    hardware = hardware_of(settings)
    loaded = load_model(settings, hardware)  # a fault of the model ends the run before it starts
    _check_flags(loaded.planner, settings, cases)
    model_record, notes = _record_of(loaded)
    alone = settings.engine == "local" and settings.workers == 1
    model: SegmentingModel | None = loaded if alone else None  # each worker loads its own; this process keeps none
    del loaded
    place = run_folder(settings)
    journal = place / JOURNAL
    jobs = part_of([(index, case, name) for index, (case, name) in enumerate(zip(cases, names, strict=True))], settings.shard)
    with Run("segment", place, settings=settings, device=hardware.device) as run:
        run.results = {"model": model_record, "hardware": hardware.record(), "cases": [], "notes": notes}
        run.results |= {} if settings.shard is None else {"shard": shard_record(settings, cases, names)}
        entries: list[dict[str, Any]] = run.results["cases"]
        journal.unlink(missing_ok=True)  # of a run that was killed
        with closing(_entries(settings, hardware, model, jobs, watcher)) as finished:  # Ctrl-C stops the workers here and now
            for entry in finished:
                entries.append(entry)
                append_line(journal, entry)  # the report is written whole at the end alone: a case costs the same in any cohort
                watcher.case(len(entries), len(jobs), entry)
        entries.sort(key=lambda entry: entry["index"])
        for path in write_cohort_table(settings.out, (entry["folder"] for entry in entries if "folder" in entry), to=place):
            run.add_output(path.name, path)
        run.results |= totals(entries)
    journal.unlink(missing_ok=True)  # all of it is in the report
    return run.results


def _check_flags(planner: Planner, settings: SegmentSettings, cases: Sequence[Case]) -> None:
    """What was asked for by flags holds for every case: a fault in it is wrong use, not the fault of a case."""
    facts = planner.facts
    refuse_flags_together(settings, cases)
    modalities = dict.fromkeys(case.modality for case in cases)
    if settings.orientation_code is not None:
        check_orientation(settings.orientation_code)
    for modality in modalities if settings.modality is not None or settings.image is not None else ():
        if settings.labels:
            route_labels(facts, settings.labels, modality, region=settings.region, allow_unknown=settings.allow_unknown)
        planner.rules(canonical_modality(modality))
    if settings.region is not None and settings.region not in facts.experts:
        default_vocabulary().checked_region(settings.region)


def _record_of(model: SegmentingModel) -> tuple[dict[str, Any], list[str]]:
    """What the report says of a model, and its notes."""
    bundle = model.bundle
    return {"name": bundle.name, "sha256": bundle.sha256, "precision": model.precision}, list(bundle.notes)


def plan_cases(settings: SegmentSettings) -> dict[str, Any]:
    """What a run would do here and now, from headers and the pack's manifest; loads no network unless the model is no pack.

    Raises:
        InputError: wrong use.
    """
    facts = None if settings.text or settings.prompt_embeddings else facts_of_pack(settings.model)
    if facts is None:
        facts = facts_of_bundle(_load_bundle(settings))
    planner = Planner(facts, hardware_of(settings), _choices(settings))
    cases = collect_cases(settings)
    _check_flags(planner, settings, cases)
    plans: list[dict[str, Any]] = []
    for case, name in part_of(list(zip(cases, folder_names(cases), strict=True)), settings.shard):
        try:
            with only_known_faults(case.image):
                shape, affine = _grid_of(case, settings.affine_from)
                routes = _routes(settings, facts, case)
                plan = planner.plan(shape, affine, routes, where=str(case.image), **_asked_of(settings, case))
            plans.append({"name": name, "image": str(case.image), "plan": plan.record(), "in_words": plan.in_words()})
        except MedloreError as error:
            plans.append({"name": name, "image": str(case.image), "error": str(error)})
    return {"model": facts.name, "hardware": planner.hardware.record(), "settings": settings.model_dump(mode="json"), "cases": plans}


def hardware_of(settings: SegmentSettings) -> Hardware:
    """Device, precision and memory of one worker of a run; on Ray each worker has a GPU of its own.

    Raises:
        InputError: the device is not on this machine, or no size of memory.
    """
    work: Work = "published" if settings.published else "inference"
    hardware = decide_hardware(settings.device, settings.precision, work=work, memory=settings.memory)
    return hardware.shared_by(settings.workers, device_too=settings.engine == "local")


def load_model(settings: SegmentSettings, hardware: Hardware | None = None) -> SegmentingModel:
    """The model that the settings name, on the hardware that was decided for the run."""
    from medlore.segmenting.model import SegmentingModel

    return SegmentingModel(_load_bundle(settings), hardware or hardware_of(settings), _choices(settings))


def _choices(settings: SegmentSettings) -> Choices:
    return Choices(**{field.name: getattr(settings, field.name) for field in fields(Choices)})


def _asked_of(settings: SegmentSettings, case: Case) -> dict[str, Any]:
    """What a plan must know of a case beside its image and labels."""
    return {"orientation_code": case.orientation_code or settings.orientation_code, "grid": settings.grid}


def segment_case(settings: SegmentSettings, model: SegmentingModel, case: Case, name: str, watcher: CohortWatcher) -> dict[str, Any]:
    """One case, from the file to its folder; never raises for a fault of the case."""
    start = time.perf_counter()
    entry: dict[str, Any] = {"name": name, "image": str(case.image), "line": case.line or None}
    try:
        with only_known_faults(case.image):  # a fault of ours, or of a library, must not end the night's run
            entry |= _segment_case(settings, model, case, name, watcher)
    except MedloreError as error:
        entry |= {"state": "failed", "error": str(error)}
    return entry | {"seconds": round(time.perf_counter() - start, 3)}


def _segment_case(settings: SegmentSettings, model: SegmentingModel, case: Case, name: str, watcher: CohortWatcher) -> dict[str, Any]:
    from medlore.data.volumes.preparation import read_volume
    from medlore.segmenting.outputs import fault_of, write_outputs

    routes = _routes(settings, model.facts, case)
    existing_image(case.image)
    digest = content_hash(case.image)
    name, moved = folder_for(settings.out, name, case, digest)
    fingerprint = _fingerprint(settings, model, case, routes, digest)
    folder = settings.out / name
    notes = [] if moved is None else [moved]
    if settings.resume and _is_finished(folder, fingerprint, settings):
        return {"state": "skipped", "folder": name, "check": _verdict_of_before(folder), "notes": notes}
    start = time.perf_counter()
    shape, affine = _grid_of(case, settings.affine_from)
    # from the header: what is too large is said before it is read
    plan = model.planner.plan(shape, affine, routes, where=str(case.image), **_asked_of(settings, case))
    most = model.planner.hardware.memory_bytes
    volume = read_volume(case.image, affine_from=settings.affine_from, frame=case.frame, series=case.series, most_bytes=most)
    read = time.perf_counter() - start
    reference = _check_what_fails_late(settings, folder, volume, routes)
    watcher.plan(name, plan)
    brain = None if settings.brain_mask is None else read_brain_mask(settings.brain_mask, volume, affine_from=settings.affine_from)
    result = model.execute(
        plan, volume, routes, resample=settings.resample, brain=brain, on_window=lambda done, total: watcher.window(name, done, total)
    )
    result.seconds = {"read": read, **result.seconds}
    about = {
        "image": str(case.image),
        "image_sha256": digest,
        "case": case.to_dict(),
        "model": {"name": model.bundle.name, "sha256": model.bundle.sha256},
        "precision": model.precision,
        "published_rules": settings.published,
        "fingerprint": fingerprint,
    }
    kept: list[str] = []
    wanted = replace(_wanted_by(settings), reference=reference)
    record = write_outputs(folder, result, about=about, wanted=wanted, kept=kept)
    notes += [*record["notes"], *([f"not written by the run before, so kept: {', '.join(kept)}"] if kept else [])]
    fault = fault_of(record, folder)
    return {
        **({"state": "done"} if fault is None else {"state": "failed", "error": str(fault)}),
        "folder": name,
        "volume_ml": {e["label"]: e["volume_ml"] for e in record["labels"]},
        "check": [] if record["check"] is None else record["check"]["says"],
        "notes": notes,
        "phases": record["seconds"],
    }


def _check_what_fails_late(settings: SegmentSettings, folder: Path, volume: Volume, routes: Routes) -> ReferenceSeries | None:
    """What would fail when the network has run is said before it runs: the folder, the disk, what formats of DICOM refer to."""
    from medlore.data.volumes.reference import read_reference
    from medlore.segmenting.outputs import RECORDS, check_room

    refuse_strangers(folder, set(RECORDS))
    check_room(settings.out, volume, len(routes.labels), image=settings.image_copy)
    needing = [made for made in formats_named(settings.formats) if made.check is not None]
    names = ", ".join(made.name for made in needing)
    if not needing:
        return None
    if settings.grid != "original":
        raise InputError(f"--format {names}", "given with --grid processed", "masks on the grid of the series", "leave one of them out")
    reference = None if settings.dicom_reference is None else read_reference(settings.dicom_reference, volume)
    for made in needing:
        made.check(volume if reference is None else reference.volume)  # type: ignore[misc]
    return reference


def _entries(
    settings: SegmentSettings,
    hardware: Hardware,
    model: SegmentingModel | None,
    jobs: Sequence[tuple[int, Case, str]],
    watcher: CohortWatcher,
) -> Generator[dict[str, Any], None, None]:
    """Entries of the report as cases finish.

    Args:
        settings: of the run.
        hardware: of one worker.
        model: where this process does the work itself.
        jobs: place in the list, case and name.
        watcher: of the progress.
    """
    if model is not None:
        for index, case, name in jobs:
            yield {"index": index, **segment_case(settings, model, case, name, watcher)}
        return
    gpus = int(hardware.device == "cuda")
    given = [(settings, hardware, *job) for job in jobs]
    yield from spread(_work, given, lost=_lost, engine=settings.engine, workers=settings.workers, gpus_each=gpus)


_models: dict[str, SegmentingModel] = {}


def _work(settings: SegmentSettings, hardware: Hardware, index: int, case: Case, name: str) -> dict[str, Any]:
    """One case in a worker process; the model stays loaded between its cases."""
    key = f"{settings.model_dump_json()} {hardware}"
    if key not in _models:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.workers))
        _models.clear()
        _models[key] = load_model(settings, hardware)
    return {"index": index, **segment_case(settings, _models[key], case, name, Silence())}


def _lost(job: tuple[Any, ...], reason: str) -> dict[str, Any]:
    _, _, index, case, name = job
    return {
        "index": index,
        "name": name,
        "image": str(case.image),
        "line": case.line or None,
        "state": "failed",
        "error": f"{reason}, or a smaller --memory",
        "seconds": None,
    }


def _load_bundle(settings: SegmentSettings) -> Any:
    from medlore.models.segmenter.bundle import load_segmenter

    return load_segmenter(
        settings.model,
        text=settings.text,
        tokenizer=settings.tokenizer,
        prompt_embeddings=settings.prompt_embeddings,
        lora_alpha=settings.lora_alpha,
    )


def _routes(settings: SegmentSettings, facts: ModelFacts, case: Case) -> Routes:
    dataset = case.dataset if settings.expert_by == "dataset" else None
    return route_labels(facts, case.labels, case.modality, region=settings.region, dataset=dataset, allow_unknown=settings.allow_unknown)


def _grid_of(case: Case, affine_from: AffineChoice) -> tuple[Any, Any]:
    return read_grid(case.image, ReadOptions(affine_from, frame=case.frame, series=case.series))


def _fingerprint(settings: SegmentSettings, model: SegmentingModel, case: Case, routes: Routes, digest: str) -> str:
    decisive = settings.decisive() | {"precision": model.precision}
    orientation = case.orientation_code or settings.orientation_code
    part = [case.frame, case.series]
    beside = (settings.prompt_embeddings, settings.text, settings.tokenizer, settings.brain_mask, settings.dicom_reference)
    prompts = [sha256_of(file) for file in beside if file is not None]
    weights = [model.bundle.sha256, *prompts]
    decisive_parts = [RULES_VERSION, digest, weights, routes.modality, routes.by_region, routes.labels, orientation, part, decisive]
    return hashlib.sha256(json.dumps(decisive_parts, sort_keys=True).encode()).hexdigest()


def _wanted_by(settings: SegmentSettings) -> Wanted:
    """What of a case is written."""
    from medlore.segmenting.outputs import Wanted

    how = {"names": settings.names, "binary": settings.binary, "crop_mm": settings.crop_output}
    return Wanted(settings.formats, settings.overlap_rule, settings.image_copy, settings.picture, **how)  # type: ignore[arg-type]


def _is_finished(folder: Path, fingerprint: str, settings: SegmentSettings) -> bool:
    """Whether the same run was done, and every file that this one would write is there."""
    from medlore.segmenting.outputs import Wanted, output_names

    try:
        record = read_json(folder / "case.json")
        if record["state"] != "done" or record["fingerprint"] != fingerprint:
            return False
        wanted = _wanted_by(settings)
        if record.get("layout", Wanted().layout()) != wanted.layout():
            return False
        names = output_names(record, wanted)
        return all((folder / name).is_file() for name in (*names, *record["maps"]))
    except (InputError, DataError, KeyError, TypeError):
        return False


def _verdict_of_before(folder: Path) -> list[str]:
    """What the verdict of a finished case said."""
    record = read_json(folder / "case.json").get("check")
    return [] if record is None else list(record["says"])
