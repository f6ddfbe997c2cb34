"""A worker that dies takes its own case with it and no other."""

from __future__ import annotations

import os

from dying_worker import job, lost
from medlore.runs.workers import spread


def test_only_the_job_that_kills_its_process_is_lost() -> None:
    entries = sorted(spread(job, [(0, 0), (1, 1), (2, 0)], lost=lost, engine="local", workers=2), key=lambda e: e["index"])
    assert [e["index"] for e in entries] == [0, 1, 2]
    assert "fewer --workers" in entries[1]["lost"]
    assert {entries[0]["process"], entries[2]["process"]}.isdisjoint({os.getpid()})
