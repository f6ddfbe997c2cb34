"""`medlore doctor`: is this machine ready?"""

from __future__ import annotations

import typer

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import Settings


def doctor(given: Given) -> None:
    """Check this machine: versions, devices, optional packages, an incompatible torchvision, free disk space."""
    _, output = given.read(Settings, Output)
    from medlore.commands.screens.doctor import print_findings
    from medlore.inspecting.doctor import check_machine

    findings = check_machine()
    print_findings(findings, as_json=output.as_json)
    if any(f.state == "bad" for f in findings):
        raise typer.Exit(1)


app = command(doctor, Output)
