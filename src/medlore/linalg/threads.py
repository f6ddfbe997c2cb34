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

    Their threads wait for each other actively after every small operation: on two cores, a certified stable rank of a
    1024 x 1024 matrix took 384 ms with two threads of each and 49 ms with one.
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
