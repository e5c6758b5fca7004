"""SIGTERM as a request to stop between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_sigterm(handle: Callable[[], None]) -> Iterator[None]:
    """Call `handle` on SIGTERM while the block runs.

    Python allows signal handlers only in the main thread: elsewhere `handle` is never called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda _signal, _frame: handle())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets while the block runs."""
    requested = threading.Event()
    with on_sigterm(requested.set):
        yield requested
