"""The pipe through which child processes send results, one line of JSON at a time.

It is a named pipe, so that ranks find it behind torchrun. It carries nothing else: what a library
prints in a child goes to standard error. The reader notices when the last writer is gone.
"""

import fcntl
import math
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

import eagle_core.errors
import storage.errors

VARIABLE = "EYAS_CHANNEL"
"""Environment variable of a child that names its pipe."""
ANSWERED_FAILURE = 3
"""Exit status after a failure that was reported."""
_POLL_SECONDS = 0.05
_READ_BYTES = 1 << 16
_TRACEBACK_CHARS = 4000

Request = TypeVar("Request", bound=BaseModel)


class Failure(BaseModel):
    """An error that ended the work of a child."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failure: str
    """Module and name of the error's class."""
    message: str
    traceback: str = ""
    """Only for an unexpected error: a defect, or a library's error."""


FAILURE_PREFIX = '{"failure":'
"""Start of each line that is a `Failure`."""


class Ended(BaseModel):
    """Sent by a child when a request is done, or its error reported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ended: bool


class InactivityError(Exception):
    """A channel received nothing for too long."""


class Channel:
    """The parent's end: created before the child, which finds it by its environment."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="eyas-channel-")
        path = Path(self._folder) / "pipe"
        os.mkfifo(path)
        self._pipe: int | None = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._lock = threading.Lock()
        self._buffer = b""
        self.environment = {VARIABLE: str(path)}

    def lines(
        self, has_ended: Callable[[], bool], *, inactivity_timeout_seconds: float = math.inf
    ) -> Iterator[str]:
        """Yield lines until all writers have ended, or another thread closes the channel.

        Raises:
            InactivityError: no line arrived for `inactivity_timeout_seconds`.

        """
        last_received, is_last_read = time.monotonic(), False
        while True:
            data = self._read()
            if data:
                last_received = time.monotonic()
                *whole, self._buffer = (self._buffer + data).split(b"\n")
                for line in whole:
                    yield line.decode()
                continue
            if is_last_read:
                return
            is_last_read = has_ended() or self._pipe is None
            if time.monotonic() - last_received > inactivity_timeout_seconds:
                raise InactivityError
            if not is_last_read:
                self._wait(is_open=data is None)

    def close(self) -> None:
        """Close the pipe; a later write fails, because nobody reads."""
        with self._lock:
            pipe, self._pipe = self._pipe, None
            if pipe is not None:
                os.close(pipe)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> bytes | None:
        """Return received bytes, b"" if no writer has the pipe open, None if none has written."""
        with self._lock:  # a closed descriptor may be another file's by now
            try:
                return b"" if self._pipe is None else os.read(self._pipe, _READ_BYTES)
            except BlockingIOError:
                return None

    def _wait(self, *, is_open: bool) -> None:
        pipe = self._pipe
        if pipe is None or not is_open:  # poll would return at once
            time.sleep(_POLL_SECONDS)
            return
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        poll.poll(10_000 * _POLL_SECONDS)


class ChannelWriter:
    """A child's end, shared with its threads and with other ranks: lines are never interleaved.

    Opening it redirects standard output to standard error.
    """

    def __init__(self, pipe: Path) -> None:
        """Open the pipe, whose other end is open already; OSError if the parent is gone."""
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # else waits for a reader
        os.set_blocking(descriptor, True)
        self._pipe = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = (pipe.parent / "lock").open("w")
        self._threads = threading.Lock()
        sys.stdout.flush()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(self, line: BaseModel) -> None:
        """Write one line."""
        text = line.model_dump_json(exclude_defaults=True) + "\n"
        with self._threads:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                self._pipe.write(text)
                self._pipe.flush()
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)


@cache
def channel_writer() -> ChannelWriter:
    """Return this child's writer."""
    return ChannelWriter(Path(os.environ[VARIABLE]))


def send(line: BaseModel) -> None:
    """In the child: send one line."""
    channel_writer().send(line)


def report_errors(work: Callable[[], None]) -> int:
    """In the child: do the work and report expected errors; return the exit status."""
    try:
        work()
    except (eagle_core.errors.EagleCoreError, storage.errors.StorageError) as error:
        send(Failure(failure=_name(error), message=str(error)))
        return ANSWERED_FAILURE
    return 0


def serve(kind: type[Request], work: Callable[[Request], None]) -> int:
    """In the child: serve each request on standard input, a line of JSON, until there is none.

    An unexpected error ends the process, because its state is unknown.
    """
    channel_writer()  # before a library prints
    for line in sys.stdin:
        try:
            report_errors(lambda line=line: work(kind.model_validate_json(line)))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 (whatever it is, the parent reports it)
            if _is_device_error(error):
                _kill_self(error)
            text = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]
            send(Failure(failure=_name(error), message=str(error), traceback=text))
            return 1
        send(Ended(ended=True))
    return 0


def _is_device_error(error: Exception) -> bool:
    """Return whether memory or a GPU failed: another process may succeed."""
    is_cuda = type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
    return isinstance(error, MemoryError) or is_cuda


def _kill_self(error: Exception) -> None:
    """End this process as the kernel would, with the traceback as its last output."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _name(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"
