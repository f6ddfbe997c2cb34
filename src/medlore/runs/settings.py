"""What every recipe shares: settings from YAML and flags, seed, device, and the `report.json` that each run leaves."""

from __future__ import annotations

import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

import pydantic
import yaml

from medlore.errors import InputError, nearest_names
from medlore.files import existing_file, read_json, sha256_of, write_json

REPORT_SCHEMA = "medlore/report/1"
DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]

_REPORTED_PACKAGES = ("medlore", "torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "nibabel", "scikit-learn")


class Settings(pydantic.BaseModel):
    """Base of every recipe's settings: unknown keys are refused, values are frozen."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """`steps: yes` would become 1: Python counts with its truth values."""
        if isinstance(value, bool) and info.field_name is not None and not _takes_bool(cls.model_fields[info.field_name].annotation):
            raise ValueError("true and false are no numbers or names here")
        return value


S = TypeVar("S", bound=Settings)
_FEW_NAMES = 8  # so many are listed whole


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any, object) or isinstance(annotation, bool) or any(_takes_bool(part) for part in get_args(annotation))


def read_settings(kind: type[S], file: str | Path | None = None, **flags: Any) -> S:
    """Settings from a YAML file (optional) with the flags that are not None laid over it.

    Raises:
        InputError: unknown or repeated keys or wrong values; all of them at once, each with its line.
    """
    values: dict[str, Any] = {}
    lines: dict[Place, int] = {}
    repeated: list[str] = []
    if file is not None:
        try:
            text = existing_file(file).read_text(encoding="utf-8")
            loaded, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
            lines, repeated = _lines_of(tree), _repeated_keys(tree)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2024-13-01 is a ValueError
            raise InputError(str(file), f"not YAML ({error})", "a YAML mapping of settings", "mend the file") from error
        if not isinstance(loaded, dict):
            raise InputError(str(file), f"holds a {type(loaded).__name__}", "a YAML mapping of settings", "write `name: value` lines")
        values.update(loaded)
    values.update({name: value for name, value in flags.items() if value is not None})
    lines = {place: line for place, line in lines.items() if flags.get(str(place[0])) is None}
    return check_settings(kind, values, where=str(file) if file is not None else "settings", lines=lines, faults=repeated)


Place = tuple[str | int, ...]


def lines_in(file: str | Path) -> dict[Place, int]:
    """Where each key and list entry of a YAML file that `read_settings` has read stands: place -> line, from 1."""
    return _lines_of(yaml.compose(existing_file(file).read_text(encoding="utf-8"), yaml.SafeLoader))


def _lines_of(node: yaml.Node | None, place: Place = (), seen: set[int] | None = None) -> dict[Place, int]:
    """Where each key and list entry of a YAML file stands: (tasks, 0, name) -> line; what an alias repeats is looked at once."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return {}
    seen.add(id(node))
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(number, value, value) for number, value in enumerate(node.value)]
    found: dict[Place, int] = {}
    for name, key, value in children:
        found[*place, name] = key.start_mark.line + 1
        found |= _lines_of(value, (*place, name), seen)
    return found


def _repeated_keys(node: yaml.Node | None, place: Place = (), seen: set[int] | None = None) -> list[str]:
    """Keys that stand twice in one mapping, where YAML would silently take the last: one sentence each."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return []
    seen.add(id(node))
    faults: list[str] = []
    if isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            here, line = (*place, str(key.value)), key.start_mark.line + 1
            if (word := (key.tag, str(key.value))) in first:
                name = ".".join(str(part) for part in here)
                faults.append(f"line {line}, {name}: given before in line {first[word]}; which one is meant?")
            first.setdefault(word, line)
            faults += _repeated_keys(value, here, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            faults += _repeated_keys(value, (*place, number), seen)
    return faults


def check_settings(
    kind: type[S], values: Mapping[str, Any], *, where: str, lines: Mapping[Place, int] | None = None, faults: Sequence[str] = ()
) -> S:
    """Validate a mapping into settings.

    Args:
        kind: the settings.
        values: what came.
        where: the file, for the message.
        lines: where each entry stands in that file.
        faults: what is wrong with the file already.

    Raises:
        InputError: unknown keys or wrong values; all of them at once.
    """
    cause, told = None, list(faults)
    try:
        settings = kind.model_validate(dict(values))
    except pydantic.ValidationError as error:
        told += [_fault(kind, item["loc"], item["type"], item["msg"], item.get("input"), lines or {}) for item in error.errors()]
        cause = error
    if told:
        count = f"{len(told)} fault" + ("s" if len(told) > 1 else "")
        raise InputError(where, count, f"the settings of {kind.__name__}", "correct what is listed", faults=told) from cause
    return settings


def _fault(kind: type[Settings], place: Place, fault: str, message: str, came: Any, lines: Mapping[Place, int]) -> str:
    """One sentence on one entry of a file."""
    line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
    name = ("" if line is None else f"line {line}, ") + ".".join(str(part) for part in place)
    if fault == "extra_forbidden":
        near = ", ".join(nearest_names(str(place[-1]), _settings_at(kind, place[:-1]).model_fields))
        return f"{name}: unknown setting; the nearest are {near}"
    expected = _literals_of(kind, place) if fault == "literal_error" else ()
    if len(expected) > _FEW_NAMES and isinstance(came, str):
        return f"{name}: unknown name {came!r}; the nearest of {len(expected)} are {', '.join(nearest_names(came, expected))}"
    message = message.removeprefix("Value error, ")
    if not place:  # several settings that do not go together
        return message
    return f"{name}: {message}" if fault == "missing" else f"{name}: {message}, got {came!r}"


def _literals_of(kind: type[Settings], place: Place) -> tuple[str, ...]:
    """The names that an entry may have, through tuples and optional values."""
    field = next((f for part in reversed(place) if (f := _settings_at(kind, place[:-1]).model_fields.get(str(part)))), None)

    def names(annotation: Any) -> Iterator[str]:
        for part in get_args(annotation):
            if isinstance(part, str):
                yield part
            else:
                yield from names(part)

    return () if field is None else tuple(names(field.annotation))


def _settings_at(kind: type[Settings], place: Place) -> type[Settings]:
    """The settings class that holds an entry: the names in it are those that can be meant."""
    for part in place:
        field = kind.model_fields.get(str(part))
        kind = kind if field is None else next(_classes_in(field.annotation), kind)
    return kind


def _classes_in(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)


def choose_device(choice: DeviceChoice = "auto") -> str:
    """`cuda`, `mps` or `cpu`; `auto` takes the first that is there.

    Raises:
        InputError: the device that was asked for is not on this machine.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        return next(name for name, found in there.items() if found)
    if not there[choice]:
        raise InputError(
            "--device", f"{choice!r}, which is not on this machine", ", ".join(k for k, v in there.items() if v), "take --device auto"
        )
    return choice


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party code draws from the legacy generator
    torch.manual_seed(seed)


class Run:
    """One run of a recipe; as a context manager it writes `OUT/report.json` however the run ends.

    Args:
        verb: the command, e.g. `finetune`.
        out: folder of the outputs; created.
        settings: what the run was asked to do; written out in full.
        seed: seed of the run, if it draws at random.
        device: device on which it runs, if any.

    The report holds: schema, verb, command, state (`done`, `failed`, `interrupted`), versions, git, machine, settings, seed,
    device, inputs (path -> sha256), outputs (name -> path below OUT), results, seconds, peak_memory_bytes.
    """

    def __init__(
        self, verb: str, out: str | Path, *, settings: Settings | Mapping[str, Any], seed: int | None = None, device: str | None = None
    ) -> None:
        self.out = Path(out)
        self.results: dict[str, Any] = {}
        self._inputs: dict[str, str] = {}
        self._outputs: dict[str, str] = {}
        self._head: dict[str, Any] = {
            "schema": REPORT_SCHEMA,
            "verb": verb,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "settings": settings.model_dump(mode="json") if isinstance(settings, Settings) else dict(settings),
            "seed": seed,
            "device": device,
        }
        self._start = time.perf_counter()

    def add_input(self, path: str | Path) -> None:
        """Record an input file or folder with its hash."""
        self._inputs[str(path)] = sha256_of(path)

    def add_output(self, name: str, path: str | Path) -> None:
        """Record an output below the run's folder."""
        self._outputs[name] = os.path.relpath(path, self.out)

    def write(self, state: str) -> Path:
        """Write `report.json` as it stands."""
        report = {
            **self._head,
            "state": state,
            "inputs": self._inputs,
            "outputs": self._outputs,
            "results": self.results,
            "seconds": round(time.perf_counter() - self._start, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            **describe_machine(),
        }
        return write_json(self.out / "report.json", report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.results["error"] = f"{kind.__name__ if kind else ''}: {error}"
        self.write("done" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")


def refuse_finished(out: str | Path, *, overwrite: bool, settings: Settings | None = None) -> None:
    """Keep the results of a finished run from being replaced without a word.

    Args:
        out: folder of the outputs.
        overwrite: replace them.
        settings: of the new run, where the same ones may run again: they give the same results.

    Raises:
        InputError: OUT/report.json tells of a finished run.
    """
    report = Path(out) / "report.json"
    if overwrite or not report.is_file():
        return
    try:
        told = read_json(report)
    except InputError:  # cut off: nothing finished
        return
    same = settings is not None and isinstance(told, dict) and told.get("settings") == settings.model_dump(mode="json")
    if isinstance(told, dict) and told.get("state") == "done" and not same:
        came = f"{out} holds a finished run of {told.get('verb')}, which would be replaced"
        raise InputError("--out", came, "a new folder", "name another folder, or give --overwrite")


def describe_machine() -> dict[str, Any]:
    """Versions, git state and machine, for reports."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _REPORTED_PACKAGES}},
        "git": _git_state(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
    }


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the working copy that medlore itself was imported from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True)  # noqa: S607
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, timeout=30, check=True)  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "modified": bool(status.stdout.strip())}
