"""One thread for many small products."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch and the BLAS of NumPy and SciPy use one thread; the old numbers come back after it.

    Their threads wait for each other actively after every small operation: with two of each on two cores, a certified
    stable rank takes several times as long as with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _controller().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _controller() -> ThreadpoolController:
    """Made once, after SciPy's libraries are loaded: looking for them takes milliseconds."""
    import scipy.linalg  # noqa: F401 - loads its own BLAS

    return ThreadpoolController()
