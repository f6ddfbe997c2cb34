"""One thread for many small products."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from medlore.extras import is_installed


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch and the BLAS of NumPy and SciPy use one thread; the old numbers come back after it.

    Their threads wait for each other actively after every small operation: with two of each on two cores, a certified
    stable rank takes several times as long as with one. Without threadpoolctl (extra `fast`) torch alone is held.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _one_blas_thread():
            yield
    finally:
        torch.set_num_threads(threads)


def _one_blas_thread() -> AbstractContextManager[Any]:
    return _controller().limit(limits=1, user_api="blas") if is_installed("threadpoolctl") else nullcontext()


@functools.cache
def _controller() -> Any:
    """Made once, after SciPy's libraries are loaded: looking for them takes milliseconds."""
    import scipy.linalg  # noqa: F401 - loads its own BLAS
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
