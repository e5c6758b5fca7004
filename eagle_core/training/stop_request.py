"""SIGTERM as a request that the training loop answers between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets while the block runs.

    Outside the main thread Python takes no signal handlers: there the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.signal(signal.SIGTERM, lambda _signal, _frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)
