"""`medlore view`: the page of a run, of a folder with masks, or of a rank plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medlore.errors import DataError, InputError
from medlore.files import existing_path, read_json
from medlore.pages import Notes, Page, Picture, Piece, Section, Table, write_page
from medlore.pages.demo import demo_page
from medlore.pages.masks import case_sections, is_case_folder
from medlore.pages.plan import plan_pieces
from medlore.pages.report import report_page
from medlore.pages.study import study_page

_REPORT, _PLAN = "report.json", "plan.json"
_ACCEPTED = "a folder with report.json, a folder with image.nii.gz and its masks, or a rank plan"
_SHOWN_CASES = 24


def view(source: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, a case or a plan, and return where it lies.

    Args:
        source: folder of any run (`report.json`), folder with an image and its masks, or a rank plan (`plan.json`).
        out: the HTML file; `page.html` in the folder unless given.

    Raises:
        InputError: nothing there that has a page.
        DataError: a file that is damaged.
        StepError: the page cannot be written.
    """
    source = Path(source)
    page = page_of(source)
    if out is None:
        out = source / "page.html" if source.is_dir() else source.with_suffix(".html")
    return write_page(page, out)


def page_of(source: Path) -> Page:
    """The page of a run, a case or a plan.

    Raises:
        InputError: nothing there that has a page.
        DataError: a file that is damaged.
    """
    if source.is_file():
        if source.name == _REPORT:
            return _run_page(source.parent)
        if source.suffix.casefold() != ".json":
            raise InputError(str(source), "a file of another kind", _ACCEPTED, "name the folder of the run or of the masks")
        return Page(f"Ranks of {source.stem}", [Section("Ranks", plan_pieces(source))])
    existing_path(source, _ACCEPTED)
    if (source / _REPORT).is_file():
        return _run_page(source)
    if is_case_folder(source):
        return Page(source.resolve().name, case_sections(source), subtitle="Image and masks")
    if (source / _PLAN).is_file():
        return Page(f"Ranks of {source.resolve().name}", [Section("Ranks", plan_pieces(source / _PLAN))])
    raise InputError(str(source), "nothing to show", _ACCEPTED, "name the --out folder of a run")


def _run_page(folder: Path) -> Page:
    report = read_json(folder / _REPORT)
    if not isinstance(report, Mapping) or not {"verb", "results"} <= report.keys():
        accepted = "the report of a MedLoRE run, with verb and results"
        raise DataError(str(folder / _REPORT), "not the report of a run", accepted, "name the --out folder of a run")
    build = _BY_VERB.get(str(report["verb"]), _any_run)
    return build(report, folder)


def _any_run(report: Mapping[str, Any], folder: Path) -> Page:
    if not (folder / _PLAN).is_file():
        return report_page(report, folder)
    return report_page(report, folder, more=[Section("Ranks", plan_pieces(folder / _PLAN))], shown=("ranks",))


def _segment_run(report: Mapping[str, Any], folder: Path) -> Page:
    """One case: the viewer. Several: a table and a picture each; every case folder has a page of its own."""
    cases = [case for case in report["results"].get("cases", ()) if isinstance(case, Mapping)]
    there = [
        folder / name for case in cases if (name := Path(str(case.get("folder", ""))).name) not in ("", "..") and (folder / name).is_dir()
    ]
    sections = [Section("Cases", _case_table(cases))]
    if len(there) == 1 and is_case_folder(there[0]):
        sections = [*case_sections(there[0]), *sections]
    else:
        pictures: list[Piece] = [
            Picture.from_file(path, case.name, dark=True)
            for case in there[:_SHOWN_CASES]
            if (path := case / "quality_control.png").is_file()
        ]
        hint = Notes([f"medlore view {folder / there[0].name} shows one case in the slice viewer."] if there else [])
        sections += [Section("Masks", [*([hint] if there else []), *pictures])]
    return report_page(report, folder, sections, shown=("cases",))


def _case_table(cases: list[Mapping[str, Any]]) -> list[Piece]:
    rows: list[list[Any]] = []
    faults = []
    for case in cases:
        volumes = case.get("volume_ml")
        found = sum(1 for ml in volumes.values() if ml) if isinstance(volumes, Mapping) else None
        rows.append(
            [str(case.get("name")), str(case.get("state")), found, case.get("seconds"), _joined(case, "check"), _joined(case, "notes")]
        )
        if case.get("error"):
            faults.append(f"{case.get('name')}: {case['error']}")
    table = Table(("case", "state", "labels found", "seconds", "check", "notes"), rows)
    return [table, *([Notes(faults, warning=True)] if faults else [])]


def _joined(case: Mapping[str, Any], name: str) -> str:
    return "; ".join(str(line).removeprefix("check: ") for line in case.get(name) or ())


_BY_VERB: dict[str, Callable[[Mapping[str, Any], Path], Page]] = {"demo": demo_page, "segment": _segment_run, "study": study_page}
