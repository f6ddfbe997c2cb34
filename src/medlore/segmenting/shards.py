"""Parts of a cohort on different machines (`--shard 2/8`), and one report of all of them (`medlore collect`).

Every part takes each n-th case of the list, writes the folders of its cases into the common OUT, and its own report and table into
`OUT/shards/2-of-8/`. Names of folders are those of the whole list, so that it does not matter who writes which.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from medlore.data.volumes.cases import Case
from medlore.errors import DataError, InputError
from medlore.files import read_json
from medlore.runs.report import Run
from medlore.segmenting.settings import SegmentSettings
from medlore.segmenting.statistics import write_cohort_table

SHARDS = "shards"
T = TypeVar("T")


def part_of(items: Sequence[T], shard: str | None) -> list[T]:
    """Each n-th item, from the i-th on, of a shard `i/n`; all without one.

    Example:
        >>> part_of("abcdefg", "2/3"), part_of("ab", None)
        (['b', 'e'], ['a', 'b'])
    """
    if shard is None:
        return list(items)
    number, count = map(int, shard.split("/"))
    return list(items[number - 1 :: count])


def run_folder(settings: SegmentSettings) -> Path:
    """Where the report of a run lies: OUT, or the shard's own folder below it."""
    return settings.out if settings.shard is None else settings.out / SHARDS / settings.shard.replace("/", "-of-")


def shard_record(settings: SegmentSettings, cases: Sequence[Case], names: Sequence[str]) -> dict[str, Any] | None:
    """What the report of a shard says of the whole, by which its parts are known to belong together."""
    if settings.shard is None:
        return None
    text = "\n".join(f"{name}\t{case.image}\t{case.frame}\t{case.series}" for case, name in zip(cases, names, strict=True))
    whole = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return {"shard": settings.shard, "cases": len(cases), "list_sha256": whole, "decisive": settings.decisive()}


def collect(out: str | Path) -> dict[str, Any]:
    """One `report.json` and one table for a cohort that was segmented in shards; returns what the report says under `results`.

    The reports of the shards stay where they are. A shard that is run again is collected again.

    Raises:
        InputError: no shards; some are missing, unfinished, or of another list, model or settings.
        StepError: the folder cannot be written.
    """
    out = Path(out)
    reports = _reports(out)
    faults = _faults(reports)
    if faults:
        accepted, fix = "all shards of one run, finished", "run the shards that are listed again with the same list and settings"
        raise InputError(str(out / SHARDS), f"{len(faults)} fault(s) in {len(reports)} shard(s)", accepted, fix, faults=faults)
    first = next(iter(reports.values()))
    settings = {name: value for name, value in first["settings"].items() if name != "shard"}
    with Run("segment", out, settings=settings, device=first.get("device")) as run:
        entries = sorted((entry for report in reports.values() for entry in report["results"]["cases"]), key=lambda entry: entry["index"])
        notes = list(dict.fromkeys(note for report in reports.values() for note in report["results"]["notes"]))
        kept = {name: first["results"][name] for name in ("model", "hardware")}
        run.results = {**kept, "cases": entries, "notes": notes, "shards": sorted(reports), **totals(entries)}
        for path in write_cohort_table(out, (entry["folder"] for entry in entries if "folder" in entry)):
            run.add_output(path.name, path)
    return run.results


def totals(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many cases are done, skipped and failed, and which the check flags."""
    counts = {state: sum(entry["state"] == state for entry in entries) for state in ("done", "skipped", "failed")}
    return {"counts": counts, "flagged": [entry["name"] for entry in entries if entry.get("check")]}


def _reports(out: Path) -> dict[str, dict[str, Any]]:
    """Name of a shard -> its report; one that cannot be read has none of its parts."""
    folders = [folder for folder in sorted((out / SHARDS).glob("*-of-*")) if re.fullmatch(r"\d+-of-\d+", folder.name)]
    if not folders:
        accepted, fix = "the --out folder of runs with --shard", "run `medlore segment ... --shard 1/4` and so on first"
        raise InputError(str(out), "holds no shards", accepted, fix)
    found = {}
    for folder in folders:
        try:
            report = read_json(folder / "report.json")
            found[folder.name] = report if isinstance(report, dict) else {}
        except (InputError, DataError):
            found[folder.name] = {}
    return found


def _faults(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    faults = []
    counts = {int(name.split("-of-")[1]) for name in reports}
    if len(counts) > 1:
        return [f"shards of {' and of '.join(map(str, sorted(counts)))}: {', '.join(sorted(reports))}; remove those of an earlier run"]
    (count,) = counts
    faults += [f"{number}-of-{count}: not there" for number in range(1, count + 1) if f"{number}-of-{count}" not in reports]
    wholes = {}
    for name, report in reports.items():
        try:
            state, results = report["state"], report["results"]
            wholes[name] = (results["shard"]["list_sha256"], results["shard"]["decisive"], results["model"]["sha256"])
            if state != "done":
                faults.append(f"{name}: its run is {state}")
            elif len(results["cases"]) != len(part_of(range(results["shard"]["cases"]), f"{name.split('-of-')[0]}/{count}")):
                faults.append(f"{name}: {len(results['cases'])} cases in its report, which are not all of its cases")
        except (KeyError, TypeError):
            faults.append(f"{name}: no report of a shard")
    usual = next(iter(wholes.values()), None)
    faults += [f"{name}: another list, model or settings than {next(iter(wholes))}" for name, whole in wholes.items() if whole != usual]
    return faults
