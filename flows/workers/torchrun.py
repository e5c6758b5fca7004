"""Parallel ranks under torchrun: of this machine alone, or together with other machines."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from flows.errors import ChildKilledError
from flows.workers.channel import FAILURE_PREFIX, Channel, Failure
from flows.workers.child_errors import as_raised, how_it_ended, last_output
from flows.workers.machines import Meeting

_STORE_SECONDS = 60
"""How long an operation on torchrun's store may take; its default."""


def run_ranks(
    module: str,
    request: BaseModel,
    *,
    num_ranks: int,
    environment: Mapping[str, str],
    what: str,
    meeting: Meeting | None = None,
) -> Iterator[str]:
    """Run `module` in parallel processes on this machine and yield the lines of all of them.

    They run in a separate session: a signal to the terminal's or a worker's process group does not
    reach them. To stop early, close the iterator, which ends them with SIGTERM.

    Args:
        module: dotted name; its main reads the request from the file that its argument names.
        request: passed to all ranks.
        num_ranks: number of processes on this machine; torchrun assigns their ranks.
        environment: added to the environment of this process.
        what: name of the ranks in error messages.
        meeting: with which other machines; each runs as many processes.

    Raises:
        ChildKilledError: one died without a result; torchrun has then ended the others.
        EagleCoreError, StorageError: the error that a rank reported.

    """
    with (
        tempfile.TemporaryDirectory(prefix="eyas-ranks-") as folder,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        path = Path(folder) / "request.json"
        path.write_text(request.model_dump_json(), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", *_where(meeting)),
            *("--nproc-per-node", str(num_ranks)),
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


def _where(meeting: Meeting | None) -> list[str]:
    """Return torchrun's arguments for the machines."""
    if meeting is None:
        return ["--standalone", "--local-addr", "127.0.0.1"]
    seconds = meeting.timeout_seconds
    settings = (
        f"is_host={str(meeting.is_first).lower()},join_timeout={seconds},"
        f"read_timeout={min(seconds, _STORE_SECONDS)}"
    )
    return [
        *("--nnodes", str(meeting.num_machines), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", meeting.rendezvous, "--rdzv-id", meeting.meeting_id),
        *("--rdzv-conf", settings, "--local-addr", meeting.local_address),
    ]


def _lines(
    child: subprocess.Popen[str], channel: Channel, stderr: IO[str], *, what: str
) -> Iterator[str]:
    failures: list[Failure] = []
    for line in channel.lines(lambda: child.poll() is not None):
        if line.startswith(FAILURE_PREFIX):
            failures.append(Failure.model_validate_json(line))
        else:
            yield line
    status = child.wait()
    if failures:
        raise as_raised(failures, what)
    if status != 0:
        raise ChildKilledError(how_it_ended(what, status, last_output(stderr)))
