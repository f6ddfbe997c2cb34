"""Many cases on several processes of this machine, or on the machines of a Ray cluster. What a case is, the caller knows."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Literal

from medlore.errors import StepError
from medlore.extras import require
from medlore.runs.stopping import own_signals

Entry = dict[str, Any]
Job = tuple[Any, ...]
_KILLED = "its process died; as a rule it was killed for its memory: give fewer --workers"


def spread(
    work: Callable[..., Entry],
    jobs: Sequence[Job],
    *,
    lost: Callable[[Job, str], Entry],
    engine: Literal["local", "ray"],
    workers: int,
    gpus_each: int = 0,
) -> Generator[Entry, None, None]:
    """Results of `work(*job)` for all jobs, as they finish. A job whose process dies costs the others nothing.

    Args:
        work: a function of a module, so that other processes find it.
        jobs: its arguments.
        lost: the result of a job whose process died.
        engine: processes of this machine, or Ray.
        workers: how many at a time.
        gpus_each: GPUs that Ray keeps for a job.

    Raises:
        MissingExtraError: Ray was asked for and is not installed.
        StepError: Ray does not start.
    """
    if engine == "ray":
        yield from _with_ray(work, jobs, lost, workers, gpus_each)
    else:
        yield from _with_processes(work, jobs, lost, workers)


def _with_processes(
    work: Callable[..., Entry], jobs: Sequence[Job], lost: Callable[[Job, str], Entry], workers: int
) -> Generator[Entry, None, None]:
    from concurrent.futures import as_completed
    from concurrent.futures.process import BrokenProcessPool

    again: list[Job] = []
    with _pool(min(workers, len(jobs))) as pool:
        waiting = {pool.submit(work, *job): job for job in jobs}
        for finished in as_completed(waiting):
            try:
                yield finished.result()
            except BrokenProcessPool:  # one death ends the pool and every job that is left in it
                again.append(waiting[finished])
    for job in again:  # each in a process of its own: only the one that kills its process is lost
        with _pool(1) as alone:
            try:
                yield alone.submit(work, *job).result()
            except BrokenProcessPool:
                yield lost(job, _KILLED)


@contextmanager
def _pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, at once where it ends with an exception such as Ctrl-C."""
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise
    pool.shutdown()


def _begin(parent: int) -> None:
    """In a worker: Ctrl-C is the parent's to handle, and without a parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _with_ray(
    work: Callable[..., Entry], jobs: Sequence[Job], lost: Callable[[Job, str], Entry], workers: int, gpus_each: int
) -> Generator[Entry, None, None]:
    ray = require("ray", "--engine ray")
    started_here = not ray.is_initialized()
    if started_here:
        address = os.environ.get("RAY_ADDRESS")
        size = {} if address else {"num_cpus": max(workers, 1), "include_dashboard": False}
        try:
            with own_signals():  # Ray ends the process at SIGTERM, with no report
                ray.init(address=address, logging_level="error", log_to_driver=False, **size)
        except Exception as error:  # Ray raises bare exceptions when its processes do not come up in time
            accepted, fix = "a machine or cluster on which Ray starts", "try again on a less busy machine, or take --engine local"
            raise StepError("--engine ray", f"Ray did not start ({error})", accepted, fix) from error
    try:
        remote = ray.remote(num_cpus=1, max_retries=1, num_gpus=gpus_each)(work)
        waiting = {remote.remote(*job): job for job in jobs}
        while waiting:
            (finished, *_), _ = ray.wait(list(waiting))
            job = waiting.pop(finished)
            try:
                yield ray.get(finished)
            except ray.exceptions.RayError as error:
                yield lost(job, f"{_KILLED} ({type(error).__name__})")
    finally:
        if started_here:
            ray.shutdown()
