"""One step of `same_results` while it runs: its folder, its command lines, and what they left."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._same_calls import Caller, Ended
from benchmarks._same_digests import Places, json_values, values_of


@dataclass
class Step:
    """One step while it runs: its folder, and what was found so far.

    Attributes:
        name: of the step.
        folder: where its commands run and write.
        inputs: the fixed inputs.
        fixtures: files of an older version.
        record: command -> exit status and standard output.
        kept: folders that hold work of the step before, and are not looked at.
    """

    name: str
    folder: Path
    inputs: Path
    fixtures: Path
    work: Path
    caller: Caller
    places: Places
    programs: Path
    pretrain: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)

    def run(
        self, label: str, *arguments: Any, status: int = 0, kill: bool = False, module: str = "medlore", root: Path | None = None
    ) -> Ended:
        """Run one command line and keep its status and what it printed.

        Args:
            label: name of the command in the record.
            arguments: of the command line.
            status: expected; another one is kept and reported.
            kill: kill it at its first checkpoint; nothing of it is kept but its files.
            module: program.
            root: folder whose packages it needs beside medlore.
        """
        streams = self.work / ".streams" / f"{self.name}-{label}".replace("/", "-")
        streams.parent.mkdir(parents=True, exist_ok=True)
        ended = self.caller.call(module, [str(a) for a in arguments], folder=self.folder, streams=streams, kill=kill, root=root)
        if kill:
            return ended
        found: dict[str, Any] = {"status": ended.status, "expected": status, "seconds": round(ended.seconds, 1)}
        found["stdout"] = self._printed(ended.out) if "--json" in arguments else {}
        if ended.status != status:
            found["stderr"] = self.places.clean(ended.err[-3000:])
        self.record[label] = found
        return ended

    def _printed(self, text: str) -> dict[str, Any]:
        try:
            return json_values(json.loads(text), self.places)
        except json.JSONDecodeError:
            return {"no JSON": self.places.clean(text[:300])}

    def copy(self, source: Path, name: str) -> Path:
        """A copy of a folder of an earlier step; it is not looked at again."""
        self.skipped.add(name)
        return Path(shutil.copytree(source, self.folder / name))

    def files(self) -> dict[str, Any]:
        """Every file below the folder, flat."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            place = path.relative_to(self.folder)
            if path.is_file() and place.parts[0] not in self.skipped:
                found[_steady(place.as_posix())] = values_of(path, self.places)
        return found


def _steady(name: str) -> str:
    """Event files carry time, machine and process in their name."""
    head, _, last = name.rpartition("/")
    return f"{head}/events.out.tfevents" if last.startswith("events.out.tfevents") else name
