"""What `medlore doctor` prints."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_json
from medlore.inspecting.doctor import Finding


def print_findings(findings: list[Finding], *, as_json: bool) -> None:
    """A table for people, or one JSON object `{"healthy": bool, "findings": [...]}`."""
    if as_json:
        healthy = all(f.state != "bad" for f in findings)
        print_json({"healthy": healthy, "findings": [asdict(f) for f in findings]})
        return
    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    table = Table("check", "state", "seen", "what to do", box=None, pad_edge=False)
    for f in findings:
        table.add_row(f.name, f"[{colours[f.state]}]{f.state}[/]", f.seen, f.fix)
    Console().print(table)
