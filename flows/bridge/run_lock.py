"""One owner per run: two would mix their checkpoints and curves in one folder.

The training process locks a file in the run's folder, which also names the owner. On one machine
the kernel knows whether the owner is alive. A network file system may keep the lock local to each
host: there the owner must keep changing the file, timed by the clock of the waiting process. Clocks
of two machines are never compared. A dead owner is replaced at once, or after a minute.

Of several machines that train one run together, the first one is the owner. The others lock
nothing: what the owner wrote tells them whom to join.
"""

import fcntl
import getpass
import logging
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.errors import RunBusyError

LOCK_NAME = ".training"
BEAT_SECONDS = 10.0
"""Between two heartbeats."""
DEAD_SECONDS = 60.0
"""An owner on another host without a heartbeat for this long is dead."""
_FILE_BYTES = 1024
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

logger = logging.getLogger(__name__)


class Owner(BaseModel):
    """The process that trains a run."""

    model_config = ConfigDict(frozen=True)

    token: str
    """Identifies this attempt."""
    machine: str
    """The kernel that knows the file lock."""
    host: str
    pid: int
    user: str
    since: datetime
    beat: int = 0
    nodes: int = 1
    """Machines that train the run together; the owner is the first."""
    rendezvous: str | None = None
    """HOST:PORT where the owner waits for the others, if there are several."""

    def __str__(self) -> str:
        """Return a description of the owner for a message."""
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since:%F %T} UTC"


class RunLock:
    """A run's folder, locked by this process."""

    @property
    def token(self) -> str:
        """Identify this attempt."""
        return self._owner.token

    def __init__(self, file: IO[bytes], owner: Owner) -> None:
        self._file = file
        self._owner = owner
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._taken_by: Owner | None = None

    def require(self) -> None:
        """Raise RunBusyError if another host considered this process dead and took over the run."""
        if self._taken_by is not None:
            raise RunBusyError(
                "another process has taken over this run, because this one sent no heartbeat "
                f"for {DEAD_SECONDS:.0f} s: {self._taken_by}. Let it continue, or stop it and run "
                "the same command again"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Send heartbeats until the block ends."""
        _write(self._file, self._owner)
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()
            if self._taken_by is None:
                _write(self._file, None)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                found = _read(self._file)
                if found is not None and found.token != self._owner.token:
                    self._taken_by = found
                    return
                self._owner = self._owner.model_copy(update={"beat": self._owner.beat + 1})
                _write(self._file, self._owner)
            except OSError as error:
                logger.warning("cannot write a heartbeat to %s: %s", self._file.name, error)


@contextmanager
def sole_training(
    run_path: Path, *, nodes: int = 1, rendezvous: str | None = None
) -> Iterator[RunLock]:
    """Lock a run's folder while the block trains in it; a kill releases the lock too.

    Args:
        run_path: the folder.
        nodes: number of machines that train together, of which this is the first.
        rendezvous: HOST:PORT where it waits for the others.

    Raises:
        RunBusyError: another process trains this run; names it.

    """
    run_path.mkdir(parents=True, exist_ok=True)
    path = run_path / LOCK_NAME
    path.touch()
    with path.open("r+b") as file:
        is_known_dead = _lock(file, run_path)
        before = _read(file)
        if before is not None and not (is_known_dead and before.machine == _machine()):
            _require_dead(file, before, run_path)
        if before is not None:
            logger.warning("run %s is taken over from %s", run_path.name, before)
        owner = Owner(
            token=uuid.uuid4().hex,
            machine=_machine(),
            host=socket.gethostname(),
            pid=os.getpid(),
            user=_user(),
            since=datetime.now(UTC),
            nodes=nodes,
            rendezvous=rendezvous if nodes > 1 else None,
        )
        lock = RunLock(file, owner)
        with lock.held():
            yield lock


def owner_of(run_path: Path) -> Owner | None:
    """Return who trains a run, or did when it was killed; None if nobody does."""
    try:
        with (run_path / LOCK_NAME).open("rb") as file:  # opened anew: see _require_dead
            return _read(file)
    except OSError:
        return None


def _lock(file: IO[bytes], run_path: Path) -> bool:
    """Lock the file; return whether no other process of this machine can hold the lock now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(run_path, _read(file)) from error
    except OSError as error:  # some network file systems support no locks
        logger.warning(
            "%s cannot be locked (%s); relying on its owner's heartbeats", file.name, error
        )
        return False
    return True


def _require_dead(file: IO[bytes], before: Owner, run_path: Path) -> None:
    """Raise RunBusyError if the owner sends a heartbeat."""
    logger.warning(
        "run %s belongs to %s; waiting %.0f s for a heartbeat",
        *(run_path.name, before, DEAD_SECONDS),
    )
    deadline = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, DEAD_SECONDS / 10))
        with Path(file.name).open("rb") as again:  # the open file may be a server's old copy
            found = _read(again)
        if found is None:  # the owner has ended
            return
        if found != before:
            raise _busy(run_path, found)


def _busy(run_path: Path, owner: Owner | None) -> RunBusyError:
    who = f" ({owner})" if owner else ""
    return RunBusyError(
        f"another process is training run {run_path}{who}; wait for it or cancel it, or train "
        "under another run name (--run, or `run` in the Prefect UI)"
    )


def _read(file: IO[bytes]) -> Owner | None:
    """Return the owner that a lock file names; None if it names none."""
    data = os.pread(file.fileno(), _FILE_BYTES, 0).strip()
    try:
        return Owner.model_validate_json(data) if data else None
    except ValidationError:
        return None


def _write(file: IO[bytes], owner: Owner | None) -> None:
    """Replace the content in one write: a reader always finds the current owner."""
    data = b"" if owner is None else owner.model_dump_json().encode()
    os.pwrite(file.fileno(), data.ljust(_FILE_BYTES), 0)
    os.fsync(file.fileno())  # it must reach the server, not only this host's cache


def _machine() -> str:
    """Return an id of this kernel: the containers on it share file locks."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
