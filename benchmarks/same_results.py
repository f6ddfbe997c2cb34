r"""Are the results still the same? Record what the command line gives, before and after a change of the code, and compare.

    python -m benchmarks.same_results record runs/before --data ../shared/data
    python -m benchmarks.same_results record runs/after --data ../shared/data --fixtures runs/before/fixtures
    python -m benchmarks.same_results compare runs/before runs/after

`record` runs small real work through whatever `medlore` is importable (PYTHONPATH chooses it) in one thread, and keeps for each
output what matters: digests of tensors and voxels, grids, values of JSON and CSV; not times, versions, memory or folders. `compare`
lists every difference by step and file and ends with status 1 if there is one. Changes on purpose are stated in a YAML list
(`--allow`), which every comparison prints:

    - {why: settings are nested by subject, file: '.*report.json', entry: 'settings\.(epochs|clip)', to: 'settings.training.\1'}
    - {why: checkpoints have another layout, file: '.*\.pt', drop: true}
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks._same_calls import Caller, in_turn
from benchmarks._same_differences import Rule, applied, differences, flat_record, read_rules
from benchmarks._same_digests import Places
from benchmarks._same_inputs import make_inputs
from benchmarks._same_step import Step
from benchmarks._same_steps import AT_THE_END, STEPS, chosen_steps

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy", "nibabel", "scikit-learn", "kornia", "pillow", "matplotlib")


def record(given: argparse.Namespace) -> int:
    """Run the steps and write `OUT/steps/STEP.json`, one a step; the outputs stay in `OUT/work`."""
    out = Path(given.out).resolve()
    caller = Caller(plain=given.plain)
    make_inputs(out / "inputs", Path(given.data).resolve())
    (out / "steps").mkdir(parents=True, exist_ok=True)
    programs = Path(caller.where())
    print(f"medlore of {programs}", flush=True)
    fixtures = (Path(given.fixtures) if given.fixtures else out / "fixtures").resolve()
    names = chosen_steps(given.only)
    first, last = [name for name in names if name not in AT_THE_END], [name for name in names if name in AT_THE_END]
    work = partial(_record_step, out=out, caller=caller, programs=programs, fixtures=fixtures, pretrain=given.pretrain)
    return max([0, *in_turn(work, first, jobs=given.jobs), *in_turn(work, last, jobs=1)])


def _record_step(name: str, *, out: Path, caller: Caller, programs: Path, fixtures: Path, pretrain: str | None) -> int:
    """Run one step and write what it gave; 1 if a command ended otherwise than expected."""
    inputs, work = out / "inputs", out / "work"
    places = Places({"inputs": inputs, "work": work, "fixtures": fixtures, "medlore": programs, "environment": sys.prefix, "out": out})
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    step = Step(name, folder, inputs, fixtures, work, caller, places, programs, pretrain)
    began, used = time.monotonic(), caller.seconds
    fault = _run(step)
    record = {"fault": fault, "machine": _machine(), "commands": step.record, "files": step.files()}
    (out / "steps" / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    spent = f"{time.monotonic() - began:.0f} s, {caller.seconds - used:.0f} s of processor"
    lines = [f"{name}: {len(step.record)} commands, {len(record['files'])} files, {spent}"]
    for label, command in step.record.items():
        if command["status"] != command["expected"]:
            lines.append(f"  {label}: status {command['status']} in place of {command['expected']}: {command['stderr'][-600:]}")
    if fault is not None:
        lines.append(f"  {fault}")
    print("\n".join(lines), flush=True)
    return int(len(lines) > 1)


def _run(step: Step) -> str | None:
    try:
        STEPS[step.name](step)
    except (RuntimeError, OSError) as error:
        return step.places.clean(f"{type(error).__name__}: {error}")
    return None


def _machine() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "processor": _processor(), **versions}


def _processor() -> str:
    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def compare(given: argparse.Namespace) -> int:
    """Print every difference of two records; 1 if there is one."""
    names = chosen_steps(given.only)
    records = [{name: _read(Path(folder), name) for name in names} for folder in (given.a, given.b)]
    missing = [
        f"{name}: not in {folder}"
        for folder, found in zip((given.a, given.b), records, strict=True)
        for name in names
        if found[name] is None
    ]
    faults = [f"{name}: did not end in {folder}: {record['fault']}" for folder, found in zip((given.a, given.b), records, strict=True)
              for name, record in found.items() if record is not None and record["fault"]]  # fmt: skip
    both = [name for name in names if all(found[name] is not None for found in records)]
    rules = read_rules(given.allow)
    a, b = (applied(flat_record({n: found[n] for n in both}), rules, first=k == 0) for k, found in enumerate(records))
    found = list(differences(a, b))
    for line in (*missing, *faults, *_other_machines(records, both)):
        print(line)
    for difference in found:
        print(f"{difference.step} / {difference.file}: {len(difference.lines)} differ")
        shown = difference.lines if given.all else difference.lines[: given.lines]
        for line in shown:
            print(f"    {line}")
    _summary(rules, both, a, len(found))
    return 1 if missing or faults or found else 0


def _summary(rules: Sequence[Rule], steps: Sequence[str], flat: dict[Any, dict[str, Any]], different: int) -> None:
    for rule in rules:
        print(f"stated change: {rule.says()}")
    commands = sum(file.startswith("$ ") for _, file in flat)
    entries = sum(len(values) for values in flat.values())
    print(f"{len(steps)} steps, {commands} commands, {len(flat) - commands} files, {entries} values: {different} commands or files differ")


def _other_machines(records: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Other versions or another processor may change last bits: reported as notes, and not counted as differences."""
    notes = set()
    for name in names:
        one, two = (found[name]["machine"] for found in records)
        notes |= {f"note: {key} {one.get(key)} and {two.get(key)}" for key in one if one.get(key) != two.get(key)}
    return sorted(notes)


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / "steps" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("record", help="run the steps and keep what they give")
    one.add_argument("out", help="folder of the record")
    one.add_argument("--only", action="append", default=[], metavar="STEP", help=f"one of {', '.join(STEPS)}; can be given several times")
    one.add_argument("--data", default="../shared/data", help="folder of the real sets")
    one.add_argument("--fixtures", help="files of an older version, OLD_RECORD/fixtures; default those that this record makes")
    one.add_argument("--pretrain", help="program of pre-training, as a module or a .py file, where it is not found")
    one.add_argument("--jobs", type=int, default=1, help="steps at a time, each in one thread")
    one.add_argument("--plain", action="store_true", help="a new interpreter for every command: slower, the same results")
    one.set_defaults(verb=record)
    two = verbs.add_parser("compare", help="list the differences of two records")
    two.add_argument("a")
    two.add_argument("b")
    two.add_argument("--only", action="append", default=[], metavar="STEP")
    two.add_argument("--allow", type=Path, help="YAML list of stated changes")
    two.add_argument("--lines", type=int, default=5, help="differences shown of one file")
    two.add_argument("--all", action="store_true", help="show all of them")
    two.set_defaults(verb=compare)
    given = parser.parse_args(arguments)
    return int(given.verb(given))


if __name__ == "__main__":
    sys.exit(main())
