"""`medlore decompose`: a teacher becomes a light shared backbone and one low-rank expert per task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medlore.commands.flags import Given, Output, command
from medlore.runs.hardware import DeviceChoice
from medlore.runs.settings import Settings, setting

_OVERRIDES, _SEGMENTERS, _RUN = "In place of the study's", "Studies of segmenters", "Run"


class DecomposeCall(Settings):
    """A study, and what of it is overridden."""

    study: Path = setting(..., "YAML file: tasks, teacher, student, ranks, losses; see docs/decompose.md.", argument="STUDY")
    out: Path = setting(..., "Folder of the expert pack, the report and the checkpoints.", group=_RUN)
    steps: int | None = setting(None, "Optimiser steps of every student.", group=_OVERRIDES, ge=1)
    seed: int | None = setting(None, "Seed of all random draws.", group=_OVERRIDES, ge=0)
    device: DeviceChoice | None = setting(None, "Device to run on.", group=_OVERRIDES)
    only: str | None = setting(None, "`teacher` trains the teacher alone; the same command without it continues.", group=_SEGMENTERS)
    add_expert: str | None = setting(
        None, "Train an expert for this region and add it to --pack; everything else stays as it is.", group=_SEGMENTERS
    )
    pack: Path | None = setting(None, "With --add-expert: the pack that gets the expert; default OUT/pack.", group=_SEGMENTERS)
    dry_run: bool = setting(False, "Read all data and print sizes, ranks and shares; train nothing.", group=_RUN)

    def overrides(self) -> dict[str, Any]:
        """What is said in place of the study's own settings."""
        return {"steps": self.steps, "seed": self.seed, "device": self.device}


def decompose(given: Given) -> None:
    """Split a model into one light shared backbone and a low-rank expert per task, and compare it with the networks it has to beat."""
    call, output = given.read(DecomposeCall, Output)
    from medlore.decomposing.kinds import is_segmentation_study

    how: dict[str, Any] = {"as_json": output.as_json, **call.overrides()}
    if not is_segmentation_study(call.study):
        _refuse({"--only": call.only, "--add-expert": call.add_expert, "--pack": call.pack}, "a segmenter's study (kind: segmenter)")
        from medlore.commands.screens.decomposing_classifiers import run_on_screen

        run_on_screen(call.study, call.out, dry_run=call.dry_run, **how)
        return
    from medlore.commands.screens import decomposing_segmenters as screen
    from medlore.errors import UnknownNameError

    if call.only not in (None, "teacher"):
        raise UnknownNameError("--only", call.only, ["teacher"], "leave it out for the whole study")

    if call.add_expert is None:
        _refuse({"--pack": call.pack}, "a run with --add-expert")
        screen.run_on_screen(call.study, call.out, only=call.only, dry_run=call.dry_run, **how)
    else:
        _refuse({"--only": call.only, "--dry-run": call.dry_run or None}, "a run without --add-expert")
        screen.add_on_screen(call.study, call.out, region=call.add_expert, pack=call.pack, **how)


def _refuse(flags: dict[str, object], accepted: str) -> None:
    """Flags that could not act are refused rather than passed over."""
    from medlore.errors import InputError

    given = [name for name, value in flags.items() if value is not None]
    if given:
        raise InputError(", ".join(given), "given here", accepted, "leave it out")


app = command(decompose, DecomposeCall, Output)
