"""Work in child processes: a kernel kill or a device fault costs them alone.

A child is a module of ours, and answers through a channel. A `Child` reads a request a line on
standard input, and says after each that it has ended; ranks under torchrun, of which each may
report an error, read theirs from a file. A signal is a kill, and may be tried again; an error that
is none of ours is a failure, which would happen again.
"""

import importlib
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from flows.errors import ChildFailedError, ChildKilledError, FlowError
from flows.workers.channel import Channel, Ended, Failure, SilentError

END_SECONDS = 5.0
"""How long a child may take to end before it is killed."""
_STDERR_TAIL_CHARS = 2000
_RANKS_TAIL_CHARS = 5000
_RANKS_SUMMARY = " FAILED\n---"
"""Where torchrun begins to say what became of each rank, after a traceback of its own."""
_FAILURE, _ENDED = '{"failure":', Ended(ended=True).model_dump_json()

logger = logging.getLogger(__name__)


class Child:
    """A process of `module` that answers one request after the other."""

    def __init__(self, module: str, *, environment: Mapping[str, str]) -> None:
        """Start it; `environment` is what its own differs in from this process's."""
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
        self._channel = Channel()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=self._stderr,  # until the child has found its voice
                stderr=self._stderr,
                text=True,
                env={**os.environ, **environment, **self._channel.environment},
            )
        except BaseException:
            self._channel.close()
            self._stderr.close()
            raise
        self._num_logged = 0
        self.is_idle = True
        """Whether it waits for a request; False for ever if one was not read to its end."""

    def ask(
        self, request: BaseModel, *, what: str, silence_seconds: float = math.inf
    ) -> Iterator[str]:
        """Yield the lines that answer a request; kill a child that says none for too long.

        Raises:
            ChildKilledError: the child died, or hung and was killed.
            ChildFailedError: it ended by an error that is none of ours.
            EagleCoreError, StorageError: what it reported, as it raised it; it lives on.

        """
        self.is_idle = False
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 (PIPE was asked for)
        with suppress(BrokenPipeError):  # it is dead: there will be no answer
            stdin.write(request.model_dump_json() + "\n")
            stdin.flush()
        failures: list[Failure] = []
        lines = self._channel.lines(self._has_ended, silence_seconds=silence_seconds)
        try:
            for line in lines:
                if line.startswith(_FAILURE):
                    failures.append(Failure.model_validate_json(line))
                elif line == _ENDED:
                    self.is_idle = True
                    self._log_what_it_printed(what)
                    if failures:
                        raise _as_raised(failures, what)
                    return
                else:
                    yield line
        except SilentError:
            self._process.kill()
            self._process.wait()
            raise ChildKilledError(
                f"{what} said nothing for {silence_seconds:g} s and was killed; if it was at "
                f"work, raise runner.silence_seconds{_last_words(_tail(self._stderr))}"
            ) from None
        status, tail = self._process.wait(), _tail(self._stderr)
        raise _as_raised(failures, what) if failures else _epitaph(what, status, tail)

    def _log_what_it_printed(self, what: str) -> None:
        """Pass on what libraries printed during a request, the last of it if it was much."""
        file = self._stderr.fileno()
        end = os.fstat(file).st_size
        first = max(self._num_logged, end - _STDERR_TAIL_CHARS)
        text = os.pread(file, end - first, first).decode(errors="replace").strip()
        self._num_logged = end
        if text:
            logger.info("%s printed: %s", what, text)

    def _has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """End it, from any thread; what it was working on is lost."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs
            self._process.kill()
        with suppress(BrokenPipeError), self._process:  # waits, and closes its pipes
            pass
        self._channel.close()
        self._stderr.close()


def ask(module: str, request: BaseModel, *, what: str) -> Iterator[str]:
    """Run `module` in a child process with this request and yield its lines.

    Args:
        module: dotted name; its main calls `channel.serve`.
        request: what it is to do.
        what: what the child is, for the message when it dies.

    Raises:
        ChildKilledError: the child died without an answer.
        ChildFailedError: it ended by an error that is none of ours.
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
        channel = Channel()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            text=True,
            env={**os.environ, **environment, **channel.environment},
            start_new_session=True,
        ) as child:
            try:
                yield from _lines(child, channel, stderr, what=what)
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
                channel.close()


def _lines(
    child: subprocess.Popen[str], channel: Channel, stderr: IO[str], *, what: str
) -> Iterator[str]:
    failures: list[Failure] = []
    for line in channel.lines(lambda: child.poll() is not None):
        if line.startswith(_FAILURE):
            failures.append(Failure.model_validate_json(line))
        else:
            yield line
    status = child.wait()
    if failures:
        raise _as_raised(failures, what)
    if status != 0:
        raise ChildKilledError(_how_it_ended(what, status, _tail(stderr)))


def _as_raised(failures: Sequence[Failure], what: str) -> Exception:
    """Return the first error that was reported, with what other processes say of the same kind."""
    kind = failures[0].failure
    messages = dict.fromkeys(failure.message for failure in failures if failure.failure == kind)
    message = "; another process: ".join(messages)
    if failures[0].traceback:
        return ChildFailedError(f"{what} failed: {kind}: {message}\n{failures[0].traceback}")
    module, _, name = kind.rpartition(".")
    if module not in {"eagle_core.errors", "storage.errors"}:
        return FlowError(f"{kind}: {message}")
    error: Exception = getattr(importlib.import_module(module), name)(message)
    return error


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


def _epitaph(what: str, status: int, tail: str) -> FlowError:
    kind = ChildKilledError if status < 0 else ChildFailedError
    return kind(_how_it_ended(what, status, tail))


def _how_it_ended(what: str, status: int, tail: str) -> str:
    cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = " (out of memory? lower target.batch_tokens)" if status == -9 else ""
    return f"{what} {cause}{hint}{_last_words(tail)}"


def _last_words(tail: str) -> str:
    return f"; its last words: {tail}" if tail else ""
