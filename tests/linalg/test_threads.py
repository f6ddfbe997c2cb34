"""One thread inside, and the old numbers after it."""

from __future__ import annotations

import pytest
import scipy.linalg  # noqa: F401 - its own BLAS is there from the start
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from medlore.linalg.threads import one_thread


def _threads() -> set[int]:
    return {torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")}


def test_one_thread_inside_and_the_old_numbers_after_even_a_fault() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2, user_api="blas"):  # libraries that were started with one thread stay at one
            found = _threads()
            assert 2 in found
            with one_thread():
                assert _threads() == {1}
            assert _threads() == found
            with pytest.raises(KeyError), one_thread():
                raise KeyError
            assert _threads() == found
    finally:
        torch.set_num_threads(before)
