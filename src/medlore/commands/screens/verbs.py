"""What `medlore --help` prints, in Typer's look.

Typer's own page imports a Markdown parser and rich's tracebacks, which is a third of the time that `medlore --help` takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_VERBS = Path(__file__).resolve().parents[1]
_NAME_STYLE, _FRAME_STYLE = "bold cyan", "dim"


def print_verbs(verbs: Sequence[str], usage: str, about: str, options: Mapping[str, str]) -> None:
    """Print the list of verbs, from their files alone: none is imported for it.

    Args:
        verbs: in the order in which they are listed.
        usage: the first line.
        about: one sentence on the whole.
        options: flags -> help of each option of the command itself.
    """
    console = Console(highlight=False)
    word, colon, rest = usage.partition(":")
    console.print(Padding(Text.assemble((word + colon, "bold yellow"), (rest, "bold")), 1))
    console.print(Padding(Text(about), (0, 1, 1, 1)))
    console.print(_panel("Options", options))
    console.print(_panel("Commands", {verb: caption(verb) for verb in verbs}))


def caption(verb: str) -> str:
    """The first line of what a verb says about itself.

    Examples:
        >>> caption("ranks")
        'Choose LoRA ranks for a model from its weights alone.'
    """
    text = (_VERBS / f"{verb}.py").read_text(encoding="utf-8")
    found = re.search(rf'^def {verb}\([^\n]*\n    """([^\n]*)', text, re.MULTILINE)
    return found[1].removesuffix('"""') if found else ""


def _panel(title: str, rows: Mapping[str, str]) -> Panel:
    table = Table(box=None, show_header=False, expand=True, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True, style=_NAME_STYLE, width=max(map(len, rows)))
    table.add_column(ratio=10)
    for name, text in rows.items():
        table.add_row(Text(name), Text(text))
    return Panel(table, title=title, title_align="left", border_style=_FRAME_STYLE)
