"""Many cases on several processes of this machine, or on the machines of a Ray cluster; the model is loaded once in each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from medlore.data.cases import Case
from medlore.errors import MissingExtraError, StepError
from medlore.recipes.segment import SegmentSettings, Silence, load_model, segment_case

_models: dict[str, Any] = {}


def spread(settings: SegmentSettings, cases: Sequence[Case], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Entries of the report, in the order in which cases finish.

    Raises:
        MissingExtraError: Ray was asked for and is not installed.
        StepError: a worker process died (killed for its memory, as a rule).
    """
    jobs = list(zip(range(len(cases)), cases, names, strict=True))
    yield from (_with_ray if settings.engine == "ray" else _with_processes)(settings, jobs)


def _work(settings: SegmentSettings, index: int, case: Case, name: str) -> dict[str, Any]:
    """One case in a worker; the model stays loaded between cases."""
    key = settings.model_dump_json()
    if key not in _models:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.workers))
        _models.clear()
        _models[key] = load_model(settings)
    return {"index": index, **segment_case(settings, _models[key], case, name, Silence())}


def _with_processes(settings: SegmentSettings, jobs: list[tuple[int, Case, str]]) -> Iterator[dict[str, Any]]:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with ProcessPoolExecutor(min(settings.workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_work, settings, *job) for job in jobs]
        try:
            for finished in as_completed(waiting):
                yield finished.result()
        except BrokenProcessPool as error:
            came = "a worker process died; as a rule it was killed for its memory"
            raise StepError(
                "--workers", came, "workers that fit the memory together", "give fewer --workers or a --memory for each"
            ) from error


def _with_ray(settings: SegmentSettings, jobs: list[tuple[int, Case, str]]) -> Iterator[dict[str, Any]]:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--engine ray", "ray", "ray") from error
    started_here = not ray.is_initialized()
    if started_here:
        address = os.environ.get("RAY_ADDRESS")
        size = {} if address else {"num_cpus": max(settings.workers, 1), "include_dashboard": False}
        ray.init(address=address, logging_level="error", log_to_driver=False, **size)
    try:
        work = ray.remote(num_cpus=1, max_retries=1, num_gpus=1 if settings.device == "cuda" else 0)(_work)
        waiting = [work.remote(settings, *job) for job in jobs]
        while waiting:
            finished, waiting = ray.wait(waiting)
            yield from ray.get(finished)
    finally:
        if started_here:
            ray.shutdown()
