"""A run that is asked to end (SIGTERM of a scheduler, SIGHUP of a closed terminal) ends as it does with Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_KINDS = (signal.SIGTERM, signal.SIGHUP)
_TOGETHER = 5.0  # seconds in which a second signal is taken for the first: a group of processes and its leader often receive both


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number  # as a shell reports it: 143 for SIGTERM


@contextlib.contextmanager
def ends_when_asked() -> Iterator[list[Stopped]]:
    """Inside, SIGTERM and SIGHUP raise `Stopped` in the main thread; it is put into the list too, for who has lost the exception.

    A signal that is ignored (`nohup`) stays ignored, and only the main thread can change anything.
    """
    heard: list[Stopped] = []
    last = [-_TOGETHER]

    def stop(number: int, _frame: FrameType | None) -> None:
        if time.monotonic() - last[0] < _TOGETHER:
            return  # what is being cleared away is not disturbed
        last[0] = time.monotonic()
        heard.append(Stopped(number))
        raise heard[-1]

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {kind: signal.getsignal(kind) for kind in _KINDS}
        before = {kind: handler for kind, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for kind in before:
        signal.signal(kind, stop)
    try:
        yield heard
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """What a library does to the handlers of signals inside is undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.getsignal(kind) for kind in (*_KINDS, signal.SIGINT)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            if handler is not None:
                signal.signal(kind, handler)
