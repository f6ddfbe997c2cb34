"""Run a study: every cell once, finished ones are kept, one that fails costs no other; then tables, CSV and page."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medlore.errors import InputError
from medlore.files import atomic_path, made_folder, write_text
from medlore.runs.hardware import choose_device
from medlore.runs.report import Run
from medlore.runs.workers import spread
from medlore.studies.cells import StudyCell, cells_of, chosen_cells, contenders_of, merged_settings
from medlore.studies.faults import read_study
from medlore.studies.markdown import tables_in_markdown
from medlore.studies.records import CELLS, append_record, read_records
from medlore.studies.settings import StudySettings
from medlore.studies.table import means_over_sets, ranks_of, tables_of
from medlore.studies.verdict import verdict_of_study
from medlore.studies.worker import BACKBONES, lost_cell, work_on

Say = Callable[[str], None]
_COLUMNS = (
    "data", "shots", "draw", "seed", "method", "state", "measure", "score", "majority", "probe", "validation", "learning_rate",
    "trained_parameters", "factor_parameters", "head_parameters", "steps", "best_epoch", "training_seconds", "tuning_seconds",
    "seconds", "peak_memory_bytes", "fingerprint", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        results: everything that `report.json` holds under `results`.
        failed: cells that failed, of all that the folder holds.
        page: the HTML page.
    """

    results: dict[str, Any]
    failed: int
    page: Path


def run_study(
    file: str | Path,
    out: str | Path,
    *,
    only: Sequence[str] = (),
    engine: Literal["local", "ray"] = "local",
    workers: int = 1,
    resume: bool = False,
    trials: int | None = None,
    say: Say = lambda _: None,
) -> StudyResult:
    """Run the cells of a study and write its report.

    Args:
        file: the study.
        out: folder of `cells.jsonl`, `cells.csv`, `report.json` and `report.html`.
        only: `NAME=VALUE` texts that choose cells; they run again even if they are finished, unless `resume` is given.
        engine: processes of this machine, or Ray.
        workers: cells at a time; 0 runs them in this process.
        resume: keep the finished cells of the folder, run what failed or is missing.
        trials: at most so many hyper-parameter settings for each method.
        say: hears of every cell.

    Raises:
        InputError: faults of the study, or a folder that holds cells already and neither `resume` nor `only`.
        StepError: the folder cannot be written, or Ray does not start.
    """
    study, folder = read_study(file), made_folder(out)
    cells = cells_of(study, trials=trials)
    wanted = chosen_cells(cells, only)
    before = read_records(folder)
    _refuse_mixing(folder, before, cells, only=only, resume=resume)
    kept = {key for key, record in before.items() if record["state"] == "done"} if resume else set()
    left = [cell for cell in wanted if cell.fingerprint not in kept]
    say(f"{len(wanted)} cells, {len(wanted) - len(left)} of them finished before, {len(left)} to run")
    with Run("study", folder, settings=study, seed=study.data_seed, device=choose_device(study.settings.run.device)) as run:
        run.add_input(file)
        for count, record in enumerate(_work(left, Path(file).resolve().parent, engine=engine, workers=workers), 1):
            append_record(folder, record)
            say(f"  {count}/{len(left)}  {_in_words(record)}")
        records = read_records(folder)
        own = [records[cell.fingerprint] for cell in cells if cell.fingerprint in records]
        run.results.update(results_of(study, cells, own, foreign=len(records) - len(own)))
        _write_outputs(run, study, own)
    return _conclude(run)


def _refuse_mixing(
    folder: Path, before: dict[str, dict[str, Any]], cells: Sequence[StudyCell], *, only: Sequence[str], resume: bool
) -> None:
    if not before or resume or only:
        return
    shared = len(before.keys() & {cell.fingerprint for cell in cells})
    came = f"holds {len(before)} cells already, {shared} of them of this study"
    fix = "give --resume to keep what is finished, --only to run some again, or another --out"
    raise InputError(str(folder / CELLS), came, "a folder without cells, or --resume or --only", fix)


def _work(cells: Sequence[StudyCell], folder: Path, *, engine: Literal["local", "ray"], workers: int) -> Iterator[dict[str, Any]]:
    if not cells:
        return
    if workers == 0:
        for cell in cells:
            yield work_on(cell, str(folder), 0)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    jobs = [(cell, str(folder), threads) for cell in cells]
    yield from spread(work_on, jobs, lost=lost_cell, engine=engine, workers=workers, gpus_each=_gpus(engine))


def _gpus(engine: str) -> int:
    import torch

    return 1 if engine == "ray" and torch.cuda.is_available() else 0


def results_of(study: StudySettings, cells: Sequence[StudyCell], records: Sequence[dict[str, Any]], *, foreign: int = 0) -> dict[str, Any]:
    """Tables and what a reader must know about them, from the records of a study's cells.

    Args:
        study: the grid.
        cells: all of its cells.
        records: of those that have run.
        foreign: cells of other settings that lie in the folder too.
    """
    contenders = contenders_of(study)
    names = [each.name for each in contenders]
    reference = study.reference or names[0]
    tables = tables_of(records, methods=names, reference=reference)
    failed = [
        {**{k: r[k] for k in ("data", "shots", "draw", "method", "seed")}, "reason": r["reason"]} for r in records if r["state"] != "done"
    ]
    undefined = sum(r["state"] == "done" and r["score"] is None for r in records)
    missing = len(cells) - len(records)
    notes = [
        *([f"{_cells(len(failed))} failed; `medlore study ... --resume` runs what failed again"] if failed else []),
        *([f"not run yet: {_cells(missing)}"] if missing else []),
        *([f"without a defined score, and left out of the means: {_cells(undefined)}"] if undefined else []),
        *([f"of other settings, in the folder but not counted: {_cells(foreign)}"] if foreign else []),
    ]
    return {
        "study": study.name,
        "reference": reference,
        "controls": {each.name: each.control_of for each in contenders if each.control_of},
        "trials": max((len(cell.rates) for cell in cells), default=1),
        "cells": {"all": len(cells), "done": len(records) - len(failed), "failed": len(failed), "missing": missing},
        "tables": [table.as_values() for table in tables],
        "means": means_over_sets(tables, {entry.name: entry.group for entry in study.data}, names),
        "mean_ranks": ranks_of(records, names),
        "failed": failed,
        "notes": notes,
        "verdict": verdict_of_study(tables, records, {each.name: each.method for each in contenders}),
    }


def _cells(count: int) -> str:
    return f"{count} cell" + ("" if count == 1 else "s")


def _write_outputs(run: Run, study: StudySettings, records: Sequence[dict[str, Any]]) -> None:
    from medlore.pages.study_pictures import draw_differences, draw_mean_ranks

    with atomic_path(run.out / "cells.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(records)
    run.add_output("cells", run.out / CELLS)
    run.add_output("csv", run.out / "cells.csv")
    if run.results["tables"]:
        run.add_output("tables", write_text(run.out / "tables.md", tables_in_markdown(run.results)))
        run.add_output("differences", draw_differences(run.results, records, run.out / "differences.png"))
    if run.results["mean_ranks"]:
        run.add_output("mean_ranks", draw_mean_ranks(run.results, run.out / "mean_ranks.png"))
    if (plan := _plan(run.out, study)) is not None:
        run.add_output("plan", plan)


def _plan(out: Path, study: StudySettings) -> Path | None:
    """Ranks of the first contender that takes them from the stable ranks."""
    from medlore.tuning.finetune import choose_plan

    first = next((each for each in contenders_of(study) if each.method == "sr-lora"), None)
    if first is None:
        return None
    settings = merged_settings(study.settings, first)
    chosen = settings.backbone.flat()
    backbone = BACKBONES.load(chosen.pop("model"), classes=2, **chosen)
    plan = choose_plan(settings, backbone)
    return None if plan is None else plan.save(out / "plan.json")


def _conclude(run: Run) -> StudyResult:
    from medlore.files import read_json
    from medlore.pages import write_page
    from medlore.pages.study import study_page

    page = write_page(study_page(read_json(run.out / "report.json"), run.out), run.out / "report.html")
    return StudyResult(run.results, run.results["cells"]["failed"], page)


def _in_words(record: dict[str, Any]) -> str:
    head = f"{record['data']}, {record['shots']} shots, draw {record['draw']}, {record['method']}"
    if record["state"] != "done":
        return f"{head}: failed: {record['reason']}"
    score = "not defined" if record["score"] is None else f"{record['score']:.3f}"
    return f"{head}: {record['measure'].replace('_', ' ')} {score}  ({record['seconds']:.0f} s)"


def plan_study(file: str | Path, *, only: Sequence[str] = (), trials: int | None = None, out: str | Path | None = None) -> dict[str, Any]:
    """What a study would do, after all its faults were looked for; nothing is trained or written.

    Args:
        file: the study.
        only: texts that choose cells.
        trials: at most so many hyper-parameter settings for each method.
        out: a folder whose finished cells are counted.
    """
    study = read_study(file)
    cells = chosen_cells(cells_of(study, trials=trials), only)
    records = {} if out is None else read_records(Path(out))
    finished = [cell for cell in cells if records.get(cell.fingerprint, {}).get("state") == "done"]
    tried = max((len(cell.rates) for cell in cells), default=1)
    seconds = [records[cell.fingerprint]["seconds"] for cell in finished]
    left = len(cells) - len(finished)
    return {
        "study": study.name,
        "settings": study.model_dump(mode="json", exclude_unset=True),
        "contenders": [
            {"name": each.name, "method": each.method, "rate": each.rate, "settings": dict(each.changes), "control_of": each.control_of}
            for each in contenders_of(study)
        ],
        "cells": len(cells),
        "finished": len(finished),
        "trials": tried,
        "trainings": left * tried,
        "hours_left": round(left * sum(seconds) / len(seconds) / 3600, 3) if seconds else None,
    }
