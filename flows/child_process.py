"""Work in child processes: a kernel kill or a device fault costs them alone.

A child is a module of ours. It reads one request (JSON), answers with one line of JSON at a time on
standard output, and reports an error raised on purpose as its last line. A `Child` reads a request
a line on standard input, and says after each that it has ended; ranks under torchrun, of which each
may report an error, read theirs from a file.
"""

import importlib
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from pydantic import BaseModel, ConfigDict

import eagle_core.errors
import storage.errors
from flows.errors import ChildKilledError, FlowError

ANSWERED_FAILURE = 3
"""Exit status after a failure that was reported on standard output."""
END_SECONDS = 5.0
"""How long a child may take to end before it is killed."""
_ENDED = '{"ended":true}'
_STDERR_TAIL_CHARS = 2000
_RANKS_TAIL_CHARS = 5000
_RANKS_SUMMARY = " FAILED\n---"
"""Where torchrun begins to say what became of each rank, after a traceback of its own."""


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


def answer(work: Callable[[], None], *, tell: Callable[[BaseModel], None] = say) -> int:
    """In the child: do the work, `tell` an error raised on purpose; return the exit status."""
    try:
        work()
    except (eagle_core.errors.EagleCoreError, storage.errors.StorageError) as error:
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        tell(Failure(failure=kind, message=str(error)))
        return ANSWERED_FAILURE
    return 0


def say_ended() -> None:
    """In a `Child`: the request has been answered, or its error reported."""
    sys.stdout.write(_ENDED + "\n")
    sys.stdout.flush()


class Child:
    """A process of `module` that answers one request after the other."""

    def __init__(self, module: str, *, environment: Mapping[str, str]) -> None:
        """Start it; `environment` is what its own differs in from this process's."""
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, **environment},
        )
        self.is_idle = True
        """Whether it waits for a request; False for ever if one was not read to its end."""

    def ask(
        self, request: BaseModel, *, what: str, silence_seconds: float = math.inf
    ) -> Iterator[str]:
        """Yield the lines that answer a request; kill a child that says none for too long.

        Raises:
            ChildKilledError: the child died, or hung and was killed.
            EagleCoreError, StorageError: what it reported, as it raised it; it lives on.

        """
        self.is_idle = False
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 (PIPE was asked for)
        assert stdout is not None  # noqa: S101
        with suppress(BrokenPipeError):  # it is dead: there will be no answer
            stdin.write(request.model_dump_json() + "\n")
            stdin.flush()
        failures: list[Failure] = []
        with _Watch(self._process, silence_seconds) as watch:
            for line in _until_closed(stdout):
                watch.heard()
                if line.startswith('{"failure":'):
                    failures.append(Failure.model_validate_json(line))
                elif line.rstrip() == _ENDED:
                    self.is_idle = True
                    if failures:
                        raise _as_raised(failures)
                    return
                else:
                    yield line
        status, tail = self._process.wait(), _tail(self._stderr)
        if watch.has_killed:
            raise ChildKilledError(
                f"{what} said nothing for {silence_seconds:g} s and was killed; if it was at "
                f"work, raise runner.silence_seconds{_last_words(tail)}"
            )
        raise ChildKilledError(_epitaph(what, status, tail))

    def close(self) -> None:
        """End it, from any thread; what it was working on is lost."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs
            self._process.kill()
        with suppress(BrokenPipeError), self._process:  # waits, and closes its pipes
            pass
        self._stderr.close()


class _Watch:
    """Kills a process that nothing was heard of for some time."""

    def __init__(self, process: subprocess.Popen[str], silence_seconds: float) -> None:
        self._process = process
        self._silence_seconds = silence_seconds
        self._heard = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.has_killed = False

    def __enter__(self) -> Self:
        if math.isfinite(self._silence_seconds):
            self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def heard(self) -> None:
        self._heard = time.monotonic()

    def _look(self) -> None:
        while not self._stopped.wait(max(0.0, self._left())):
            if self._left() <= 0:
                self.has_killed = True
                self._process.kill()
                return

    def _left(self) -> float:
        return self._heard + self._silence_seconds - time.monotonic()


def ask(module: str, request: BaseModel, *, what: str) -> Iterator[str]:
    """Run `module` in a child process with this request and yield its lines.

    Args:
        module: dotted name; its main reads a line and calls `say`, `answer` and `say_ended`.
        request: what it is to do.
        what: what the child is, for the message when it dies.

    Raises:
        ChildKilledError: the child died without an answer.
        EagleCoreError, StorageError: what the child reported, as it raised it.

    """
    child = Child(module, environment={})
    try:
        yield from child.ask(request, what=what)
    finally:
        child.close()


def ask_ranks(
    module: str, request: BaseModel, *, num_ranks: int, environment: Mapping[str, str], what: str
) -> Iterator[str]:
    """Run `module` in processes side by side on this machine and yield the lines of them all.

    They form a session of their own: a signal to the terminal's or a worker's process group does
    not reach them. Whoever stops early closes the iterator, which ends them with SIGTERM.

    Args:
        module: dotted name; its main reads the request from the file that its argument names.
        request: what they are to do.
        num_ranks: how many; torchrun tells each its place.
        environment: what theirs differs in from this process's.
        what: what they are, for the message when one of them dies.

    Raises:
        ChildKilledError: one died without an answer; torchrun has then ended the others.
        EagleCoreError, StorageError: what a rank reported, as it raised it.

    """
    with (
        tempfile.TemporaryDirectory(prefix="eyas-ranks-") as folder,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        path = Path(folder) / "request.json"
        path.write_text(request.model_dump_json(), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--local-addr", "127.0.0.1", "--nproc-per-node", str(num_ranks)),
            *("--log-dir", folder, "-m", module, str(path)),
        ]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        ) as child:
            try:
                yield from _lines(child, stderr, what=what)
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()


def _lines(child: subprocess.Popen[str], stderr: IO[str], *, what: str) -> Iterator[str]:
    failures: list[Failure] = []
    for line in child.stdout or ():
        if line.startswith('{"failure":'):
            failures.append(Failure.model_validate_json(line))
        else:
            yield line
    status = child.wait()
    if failures:
        raise _as_raised(failures)
    if status != 0:
        raise ChildKilledError(_epitaph(what, status, _tail(stderr)))


def _as_raised(failures: Sequence[Failure]) -> Exception:
    """Return the first error that was reported, with what other processes say of the same kind."""
    kind = failures[0].failure
    messages = dict.fromkeys(failure.message for failure in failures if failure.failure == kind)
    message = "; another process: ".join(messages)
    module, _, name = kind.rpartition(".")
    if module not in {"eagle_core.errors", "storage.errors"}:
        return FlowError(f"{kind}: {message}")
    error: Exception = getattr(importlib.import_module(module), name)(message)
    return error


def _until_closed(stdout: IO[str]) -> Iterator[str]:
    """Yield lines until the end, or until another thread closes the pipe."""
    while True:
        try:
            line = stdout.readline()
        except ValueError:
            return
        if not line:
            return
        yield line


def _tail(stderr: IO[str]) -> str:
    try:
        stderr.seek(0)
        text = stderr.read()
    except ValueError:  # closed by another thread: it was ended on purpose
        return ""
    _, is_of_ranks, summary = text.rpartition(_RANKS_SUMMARY)
    if is_of_ranks:
        return summary.strip("-=\n")[-_RANKS_TAIL_CHARS:].strip()
    return text[-_STDERR_TAIL_CHARS:].strip()


def _epitaph(what: str, status: int, tail: str) -> str:
    cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = " (out of memory? lower target.batch_tokens)" if status == -9 else ""
    return f"{what} {cause}{hint}{_last_words(tail)}"


def _last_words(tail: str) -> str:
    return f"; its last words: {tail}" if tail else ""
