"""Work in child processes: a kernel kill or a device fault affects only them.

A child runs one of our modules, and sends results through a channel. A `Child` reads one request
per line on standard input, and reports the end of each. Ranks under torchrun, each of which may
report an error, read theirs from a file. Death by a signal is a kill, and may be retried; an
unexpected error is a failure, and would happen again.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress

from pydantic import BaseModel

from flows.errors import ChildKilledError
from flows.workers.channel import FAILURE_PREFIX, Channel, Ended, Failure, InactivityError
from flows.workers.child_errors import STDERR_TAIL_CHARS, as_raised, end_error, last_output, quoted

END_SECONDS = 5.0
"""How long a child may take to end before it is killed."""
_ENDED = Ended(ended=True).model_dump_json()

logger = logging.getLogger(__name__)


class Child:
    """A process of `module` that serves one request after the other."""

    def __init__(self, module: str, *, environment: Mapping[str, str]) -> None:
        """Start it; `environment` is added to the environment of this process."""
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
        self._channel = Channel()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=self._stderr,  # until the child has opened its channel
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
        """Whether it waits for a request; False forever if a result was not read to its end."""

    def request(
        self, request: BaseModel, *, what: str, inactivity_timeout_seconds: float = math.inf
    ) -> Iterator[str]:
        """Send a request and yield its lines; kill a child that sends none for too long.

        Raises:
            ChildKilledError: the child died, or hung and was killed.
            ChildFailedError: it ended with an unexpected error.
            EagleCoreError, StorageError: the error that it reported; it stays alive.

        """
        self.is_idle = False
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 (PIPE was asked for)
        with suppress(BrokenPipeError):  # it is dead: no result will come
            stdin.write(request.model_dump_json() + "\n")
            stdin.flush()
        failures: list[Failure] = []
        lines = self._channel.lines(
            self._has_ended, inactivity_timeout_seconds=inactivity_timeout_seconds
        )
        try:
            for line in lines:
                if line.startswith(FAILURE_PREFIX):
                    failures.append(Failure.model_validate_json(line))
                elif line == _ENDED:
                    self.is_idle = True
                    self._log_output(what)
                    if failures:
                        raise as_raised(failures, what)
                    return
                else:
                    yield line
        except InactivityError:
            self._process.kill()
            self._process.wait()
            raise ChildKilledError(
                f"{what} reported nothing for {inactivity_timeout_seconds:g} s and was killed; "
                "if it was still working, raise "
                f"runner.inactivity_timeout_seconds{quoted(last_output(self._stderr))}"
            ) from None
        status, tail = self._process.wait(), last_output(self._stderr)
        raise as_raised(failures, what) if failures else end_error(what, status, tail)

    def _log_output(self, what: str) -> None:
        """Log what libraries printed during a request, only the end if it was long."""
        file = self._stderr.fileno()
        end = os.fstat(file).st_size
        first = max(self._num_logged, end - STDERR_TAIL_CHARS)
        text = os.pread(file, end - first, first).decode(errors="replace").strip()
        self._num_logged = end
        if text:
            logger.info("%s printed: %s", what, text)

    def _has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self, *, by: signal.Signals = signal.SIGTERM) -> None:
        """End it by a signal, from any thread; its current work is lost."""
        self._process.send_signal(by)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs
            self._process.kill()
        with suppress(BrokenPipeError), self._process:  # waits, and closes its pipes
            pass
        self._channel.close()
        self._stderr.close()


def run_child(
    module: str, request: BaseModel, *, what: str, environment: Mapping[str, str] = {}
) -> Iterator[str]:
    """Run `module` in a child process with this request and yield its lines.

    Args:
        module: dotted name; its main calls `channel.serve`.
        request: sent to the child.
        what: name of the child in error messages.
        environment: variables added to this process's.

    Raises:
        ChildKilledError: the child died without a result.
        ChildFailedError: it ended with an unexpected error.
        EagleCoreError, StorageError: the error that the child reported.

    """
    child = Child(module, environment=environment)
    try:
        yield from child.request(request, what=what)
    finally:
        child.close()
