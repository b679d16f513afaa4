"""Stopping a run on request: SIGTERM lets the step finish, saves and ends in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["stop_on_sigterm"]


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGTERM is remembered instead of killing; yields a function that says whether it came.

    Only the main thread can listen; elsewhere the function is always False.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
