"""The servers on this host: PostgreSQL, Prefect, and the client of both."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tests import needs
from tests.hosts.network import FIRST_ADDRESS
from tests.waiting import wait_for

_END_SECONDS = 60.0
_DATABASE_PORT = 5432
_DATABASE_USER = "eyas"
_NOBODY = 65534
"""PostgreSQL refuses to run as root."""


@dataclass(frozen=True, kw_only=True)
class Prefect:
    """A running Prefect server."""

    api_url: str
    environment: Mapping[str, str]
    """Of everything that talks to it."""
    restart: Callable[[], None]


@contextmanager
def prefect_on_postgres(folder: Path) -> Iterator[Prefect]:
    """Run Prefect's server on PostgreSQL until the block ends."""
    with _postgres(folder / "postgres.log") as database, _prefect(folder, database) as served:
        yield served


@contextmanager
def prefect_on_sqlite(folder: Path) -> Iterator[Prefect]:
    """Run Prefect's server on a file until the block ends."""
    with _prefect(folder, f"sqlite+aiosqlite:///{folder / 'prefect.db'}") as served:
        yield served


@contextmanager
def _prefect(folder: Path, database: str) -> Iterator[Prefect]:
    api_url = f"http://{FIRST_ADDRESS}:4200/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": api_url,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", FIRST_ADDRESS]
    own = {**environment, "PREFECT_API_DATABASE_CONNECTION_URL": database}
    with ExitStack() as serving:

        def serve() -> None:
            serving.enter_context(process(command, own, folder / "prefect.log"))
            wait_for(lambda: _is_healthy(api_url), what="Prefect's server")

        def restart() -> None:
            serving.close()
            serve()

        serve()
        yield Prefect(api_url=api_url, environment=environment, restart=restart)


@contextmanager
def _postgres(log: Path) -> Iterator[str]:
    """Yield the URL of a new, empty database on loopback."""
    folder = Path(tempfile.mkdtemp(prefix="eyas-postgres-"))
    programs = Path(needs.POSTGRES.path or "").resolve().parent
    user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    try:
        if user:
            os.chown(folder, _NOBODY, _NOBODY)
        data = folder / "data"
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-U", _DATABASE_USER, "--auth=trust", "-E", "UTF8"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            **user,
        )
        assert made.returncode == 0, made.stderr
        sockets = ("-c", f"unix_socket_directories={folder}", "-c", "listen_addresses=127.0.0.1")
        server = [programs / "postgres", "-D", data, "-p", str(_DATABASE_PORT), *sockets]
        with process(server, dict(os.environ), log, **user):
            ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(_DATABASE_PORT)]
            wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, what="PostgreSQL")
            yield (f"postgresql+asyncpg://{_DATABASE_USER}@127.0.0.1:{_DATABASE_PORT}/postgres")
    finally:
        shutil.rmtree(folder)


@contextmanager
def process(
    command: Sequence[str | Path], environment: Mapping[str, str], log: Path, **user: Any
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program until the block ends."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=output, **user
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _is_healthy(api_url: str) -> bool:
    try:
        with urlopen(f"{api_url}/health", timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
