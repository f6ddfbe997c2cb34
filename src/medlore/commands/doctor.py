"""`medlore doctor`: is this machine ready?"""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command()
def doctor(as_json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> None:
    """Check this machine: versions, devices, optional packages, a torchvision that does not fit, free disk."""
    from medlore.inspecting.doctor import check_machine, print_findings

    findings = check_machine()
    print_findings(findings, as_json=as_json)
    if any(f.state == "bad" for f in findings):
        raise typer.Exit(1)
