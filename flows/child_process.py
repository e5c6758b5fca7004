"""Work in a child process that loads the target: a kernel kill or a device fault costs it alone.

A child is a module of ours. It reads one request (JSON) on standard input, answers with one line of
JSON at a time on standard output, and reports an error raised on purpose as its last line.
"""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

from pydantic import BaseModel, ConfigDict

import eagle_core.errors
import storage.errors
from flows.errors import ChildKilledError, FlowError

ANSWERED_FAILURE = 3
"""Exit status after a failure that was reported on standard output."""
_STDERR_TAIL_CHARS = 2000


class Failure(BaseModel):
    """The last line of a child that raised one of our errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failure: str
    """Module and name of the error's class."""
    message: str


def say(line: BaseModel) -> None:
    """In the child: answer with one line."""
    sys.stdout.write(line.model_dump_json(exclude_defaults=True) + "\n")
    sys.stdout.flush()


def answer(work: Callable[[], None]) -> int:
    """In the child: do the work, report an error raised on purpose; return the exit status."""
    try:
        work()
    except (eagle_core.errors.EagleCoreError, storage.errors.StorageError) as error:
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        say(Failure(failure=kind, message=str(error)))
        return ANSWERED_FAILURE
    return 0


def ask(module: str, request: BaseModel, *, what: str) -> Iterator[str]:
    """Run `module` in a child process with this request and yield its lines.

    Args:
        module: dotted name; its main reads the request and calls `say` and `answer`.
        request: what it is to do.
        what: what the child is, for the message when it dies.

    Raises:
        ChildKilledError: the child died without an answer.
        EagleCoreError, StorageError: what the child reported, as it raised it.

    """
    failure: Failure | None = None
    with tempfile.TemporaryFile("w+") as stderr, _start(module, request, stderr) as child:
        for line in child.stdout or ():
            if line.startswith('{"failure":'):
                failure = Failure.model_validate_json(line)
            else:
                yield line
        status = child.wait()
        if failure is not None and status == ANSWERED_FAILURE:
            raise _as_raised(failure)
        if status != 0:
            raise ChildKilledError(_epitaph(what, status, _tail(stderr)))


def _start(module: str, request: BaseModel, stderr: IO[str]) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert child.stdin is not None  # noqa: S101 (PIPE was asked for)
    child.stdin.write(request.model_dump_json())
    child.stdin.close()
    return child


def _as_raised(failure: Failure) -> Exception:
    module, _, name = failure.failure.rpartition(".")
    if module not in {"eagle_core.errors", "storage.errors"}:
        return FlowError(f"{failure.failure}: {failure.message}")
    error: Exception = getattr(importlib.import_module(module), name)(failure.message)
    return error


def _tail(stderr: IO[str]) -> str:
    stderr.seek(0)
    return stderr.read()[-_STDERR_TAIL_CHARS:].strip()


def _epitaph(what: str, status: int, tail: str) -> str:
    cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = " (out of memory? lower target.batch_tokens)" if status == -9 else ""
    last_words = f"; its last words: {tail}" if tail else ""
    return f"{what} {cause}{hint}{last_words}"
