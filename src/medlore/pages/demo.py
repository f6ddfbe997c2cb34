"""The page of the demo: what was segmented, which ranks the model got, how tuning with them compares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlore.pages import Interval, Notes, Page, Picture, Piece, Section, Table
from medlore.pages.masks import case_sections, is_case_folder
from medlore.pages.pieces import Cell
from medlore.pages.plan import plan_pieces
from medlore.pages.report import report_page

_SHOWN = ("ranks", "factor_parameters", "uniform_rank", "measure", "majority", "table", "cells", "segmentation")


def demo_page(report: Mapping[str, Any], folder: Path) -> Page:
    """The page of a folder of `medlore demo`."""
    results = report.get("results", {})
    sections = [_segmentation(results.get("segmentation") or {}, folder)]
    if (folder / "plan.json").is_file():
        sections.append(Section("Ranks from the weights alone", plan_pieces(folder / "plan.json")))
    if results.get("table"):
        sections.append(_tuning(results, report.get("settings", {}), folder))
    page = report_page(report, folder, sections, shown=_SHOWN, pictures=False)
    return Page("MedLoRE: what it does", page.sections, "On data that is already installed, without a download.", page.facts)


def _segmentation(record: Mapping[str, Any], folder: Path) -> Section:
    title = "Segmentation by text prompts"
    if record.get("left_out"):
        return Section(title, (Notes([str(record["left_out"])]),))
    if not record:
        return Section(title, ())
    rows: list[list[Cell]] = [[row["label"], row["volume_ml"], row["dice"], row["kmeans_dice"]] for row in record["labels"]]
    note = f"Dice against {record['truth']}. The baseline is three-class k-means of the grey values inside the brain."
    table = Table(("label", "volume in ml", "Dice", "Dice of k-means"), rows, note=note)
    place = folder / Path(str(record["folder"])).name
    viewer: list[Piece] = list(case_sections(place)[0].pieces) if is_case_folder(place) else []
    words = Notes([f"{record['image']}, segmented by {record['segmenter']} in {record['seconds']:.0f} s, on its own grid."])
    missing = [Notes([f"The pack has no prompt for: {', '.join(record['without_prompt'])}."])] if record.get("without_prompt") else []
    return Section(title, [*viewer, table, words, *missing])


def _tuning(results: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> Section:
    rows: list[list[Cell]] = [
        [row["contender"], row["trained"], _interval(row["score"]), _interval(row["difference"])] for row in results["table"]
    ]
    if results.get("majority") is not None:
        rows.append(["majority class", 0, Interval(results["majority"]), None])
    measure = str(results["measure"]).replace("_", " ")
    title = f"{measure}, {settings.get('shots')} labelled images per digit, {settings.get('draws')} draws"
    note = "Means over draws with 95 % intervals. Where the interval of a difference includes zero, the two methods are not separated."
    pieces: list[Piece] = [Table(("method", "trained parameters", measure, "sr-lora minus it"), rows, title, note)]
    if (folder / "digits.png").is_file():
        pieces.append(Picture.from_file(folder / "digits.png", "One dot per draw; diamond and line: mean and its interval"))
    return Section("Few-shot tuning", pieces)


def _interval(record: Mapping[str, Any] | None) -> Interval | None:
    return None if record is None else Interval(record["mean"], record["low"], record["high"])
