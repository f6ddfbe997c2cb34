"""Tables of settings in the documents, made from the settings themselves.

    python -m maintenance.setting_tables           # rewrite what stands between the markers of docs/*.md

A marker names a class of `TABLES`: `<!-- settings: FinetuneSettings -->` up to `<!-- end of settings -->`. A test compares them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from medlore.commands.flags import metavar_of, text_of
from medlore.decomposing.classifiers.settings import DecomposeSettings
from medlore.decomposing.segmenters.few_shot_settings import FewShotSettings
from medlore.decomposing.segmenters.settings import SegmentationSettings
from medlore.runs.settings import Settings, Subject, flags_of
from medlore.segmenting.settings import SegmentSettings
from medlore.studies.settings import DataEntry, MethodEntry, StudySettings
from medlore.tuning.settings import FinetuneSettings

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLES: dict[str, type[Settings]] = {
    kind.__name__: kind
    for kind in (
        FinetuneSettings, FewShotSettings, SegmentSettings, StudySettings, DataEntry, MethodEntry, DecomposeSettings, SegmentationSettings,
    )
}  # fmt: skip
FILES_ONLY = (StudySettings, DataEntry, MethodEntry, DecomposeSettings, SegmentationSettings)  # no flag says them
_MARKED = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def table_of(kind: type[Settings]) -> str:
    """One row a setting: name, flag, default, meaning; a heading row for each subject or group."""
    head = ["setting", "default", "meaning"] if kind in FILES_ONLY else ["setting", "flag", "default", "meaning"]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *_rows(kind)]) + "\n"


def _rows(kind: type[Settings]) -> Iterator[str]:
    for name, field in kind.fields().items():
        home, facts = kind.homes().get(name), kind.facts(name)
        cells = [f"`{home}.{name}`" if home else f"`{name}`"]
        if kind not in FILES_ONLY:
            cells.append(", ".join(f"`{flag}`" for flag in flags_of(kind, name)) or (f"`{facts.argument}`" if facts.argument else ""))
        plain = not isinstance(field.default, (Settings, Subject, dict))
        shown = "required" if field.is_required() else text_of(field.default) if plain else None
        cells += ["" if shown is None else shown if shown == "required" else f"`{shown}`", facts.help or metavar_of(field.annotation)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rewritten(text: str) -> str:
    """The text of a page with its tables as they ought to be."""
    return _MARKED.sub(lambda found: found[1] + table_of(TABLES[found[2]]) + found[3], text)


def main() -> None:
    """Rewrite the pages that hold markers."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.name}: rewritten")


if __name__ == "__main__":
    main()
