"""The command line: one command, verbs in `medlore.commands`, one file a verb.

Result to stdout (``--json``: one JSON object, nothing else), progress to stderr. Exit status 0 done, 1 a case or step
failed, 2 wrong use or wrong input, 130 stopped with Ctrl-C, 143 by SIGTERM, 129 by SIGHUP. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import typer

from medlore.commands.screens.voice import is_verbose, set_loudness
from medlore.errors import InputError, MedloreError, StepError, UnknownNameError
from medlore.runs.stopping import ends_when_asked

# The verbs in the order in which people meet them; each is `medlore.commands.<verb>` with a Typer app named `app`.
VERBS = ("demo", "doctor", "info", "ranks", "finetune", "predict", "decompose", "export", "evaluate", "segment", "collect", "study", "view")


class _Verbs(typer.core.TyperGroup):
    """A group whose verbs are imported when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of verbs, from their files alone: nothing is imported for it."""
        from medlore.commands.screens.verbs import print_verbs

        options = {", ".join(option.opts): getattr(option, "help", None) or "" for option in self.get_params(ctx)}
        print_verbs(VERBS, self.get_usage(ctx), self.help or "", options)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            raise UnknownNameError("medlore", cmd_name, VERBS, "run `medlore --help`")
        found = importlib.import_module(f"medlore.commands.{cmd_name}").app
        found._add_completion = False  # completion belongs to the whole command, not to each verb
        verb = typer.main.get_command(found)
        verb.name = cmd_name
        return verb


# Typer carries its own copy of click in newer versions; the common base of its usage errors is reached through a public one.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

_STOPPED = 130
_STOPPED_MESSAGE = "stopped by the user; finished files are whole, nothing is half-written"
_ASKED_MESSAGE = "stopped by a signal; finished files are whole, nothing is half-written"

app = typer.Typer(cls=_Verbs, no_args_is_help=True, rich_markup_mode="rich")


def _print_version(wanted: bool) -> None:
    if wanted:
        from medlore import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _medlore(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and leave."),
) -> None:
    """Medical low-rank experts: choose LoRA ranks, tune on few images, decompose, segment."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; the installed `medlore` script calls this."""
    set_loudness("usual")
    with ends_when_asked() as heard:
        try:
            status = _answered(arguments)
        except (KeyboardInterrupt, typer.Abort):
            status = _STOPPED
    if heard:
        return _report(_ASKED_MESSAGE, heard[0].exit_status)
    return _report(_STOPPED_MESSAGE, _STOPPED) if status == _STOPPED else status


def _answered(arguments: Sequence[str] | None) -> int:
    """The exit status of a command line whose faults were reported."""
    command = typer.main.get_command(app)
    try:
        if _COMPLETING in os.environ:
            _rejoin_words()
        else:
            _refuse_empty(sys.argv[1:] if arguments is None else arguments)
        status = command.main(args=None if arguments is None else list(arguments), prog_name="medlore", standalone_mode=False)
    except MedloreError as error:
        return _report(str(error), error.exit_status)
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except typer.Abort:
        raise
    except OSError as error:
        if os.environ.get("MEDLORE_TRACEBACK"):
            raise
        fault = _of_system(error)
        return _report(str(fault), fault.exit_status)
    except Exception as error:
        if os.environ.get("MEDLORE_TRACEBACK") or is_verbose():
            raise
        what = f"a fault of MedLoRE itself: {type(error).__name__}: {error}"
        return _report(f"{what}. To do: run again with MEDLORE_TRACEBACK=1 and report what it prints", 1)
    return status if isinstance(status, int) else 0  # 130 where Typer has caught the Ctrl-C itself


_COMPLETING = "_MEDLORE_COMPLETE"  # set by the shell that asks what could come next


def _rejoin_words() -> None:
    """Put together what bash took apart at colons and equals signs: `medlore:seg-mini` is one word."""
    words, at = os.environ.get("COMP_WORDS", ""), os.environ.get("COMP_CWORD", "")
    if at.isdecimal():
        joined, count = re.subn(r"(?<=\S)\s([:=])\s(?=\S)", r"\1", words)
        os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = joined, str(int(at) - 2 * count)


def _of_system(error: OSError) -> MedloreError:
    """What the system said of a path, in four parts."""
    place = str(error.filename or "system")
    if error.errno == errno.ENAMETOOLONG:
        shown = f"{place[:40]}... ({len(place)} characters)"
        return InputError(shown, "a name longer than the system takes", "the path of a file or folder", "check what stands there")
    return StepError(place, error.strerror or str(error), "files and folders that can be opened", "check the path and its permissions")


def _refuse_empty(arguments: Sequence[str]) -> None:
    """An empty word, as an unset shell variable leaves it, would be read as the current folder."""
    for before, word in zip(["medlore", *arguments], arguments, strict=False):
        if not word.strip() or (word.startswith("--") and word.endswith("=")):
            place = word.strip().rstrip("=") or f"the word after {before}"
            raise InputError(place, "an empty text", "a value", "give it, or leave the flag out")


def _report(message: str, status: int) -> int:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(message, style="red" if sys.stderr.isatty() else None, markup=False)
    return status


def run() -> None:
    """Entry point of the `medlore` script."""
    sys.exit(main())
