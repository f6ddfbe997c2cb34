"""Cells of a study that share a process share the reading of the backbone and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.studies.test_study import TEXT, save_images, write_study

from medlore.models.backbones.reading import store as backbone_store
from medlore.models.backbones.store import BackboneStore
from medlore.runs.workers import spread
from medlore.studies import worker
from medlore.studies.cells import StudyCell, cells_of
from medlore.studies.faults import read_study
from medlore.studies.worker import lost_cell, work_on
from tiny_backbone import striped, write_backbone

_TIMES = ("seconds", "training_seconds", "tuning_seconds", "peak_memory_bytes", "process")


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same wherever a cell ran."""
    kept = {name: value for name, value in record.items() if name not in _TIMES}
    return kept | {"trials": [{**trial, "seconds": 0} for trial in record["trials"]]}


def alone(cell: StudyCell, folder: Path) -> dict[str, Any]:
    """The record of a cell in a process of its own."""
    return next(spread(work_on, [(cell, str(folder), 1)], lost=lost_cell, engine="local", workers=1))


def test_cells_of_one_process_read_once_and_find_what_they_find_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_backbone(tmp_path / "model")
    save_images(tmp_path / "stripes.npz", striped(10))
    text = TEXT.replace("  - linear-probe\n", "  - full\n")
    file = write_study(tmp_path, text)
    cells = [cell for cell in cells_of(read_study(file)) if cell.draw == 1]
    reads = []
    real = backbone_store.read_backbone
    monkeypatch.setattr(backbone_store, "read_backbone", lambda source, **how: (reads.append(source), real(source, **how))[1])
    monkeypatch.setattr(worker, "BACKBONES", BackboneStore())
    in_turn = [cells[-1], *cells]  # full tuning changes every weight, then everything once more
    together = [work_on(cell, str(tmp_path), 1) for cell in in_turn]
    assert [record["state"] for record in together] == ["done"] * len(in_turn), together
    assert len(reads) == 1
    assert cells[-1].method == "full"
    assert plain(together[0]) == plain(together[-1])
    for cell, record in zip(cells, together[1:], strict=True):
        if cell.method == "sr-lora":  # a process of its own takes seconds
            assert plain(alone(cell, tmp_path)) == plain(record)
