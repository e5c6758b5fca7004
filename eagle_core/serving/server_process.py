"""A server of an engine on this machine: started on loopback, waited for, and ended from here."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import IO

import httpx
import psutil

from eagle_core.errors import ConfigError, TransientError
from eagle_core.serving.engine import Launch
from eagle_core.serving.guard import END_SECONDS

LOOPBACK = "127.0.0.1"
_EVERYWHERE = {"0.0.0.0": LOOPBACK}  # noqa: S104 (where to ask a server that listens everywhere)
_STANDARD_ERROR = 2
_GUARD = Path(__file__).with_name("guard.py")
_PAUSE_SECONDS = 0.2
_REPORT_SECONDS = 30.0
_ANSWER_SECONDS = 3600.0
"""For one text: a large target on a CPU, with others before it."""
_END_SECONDS = 3.0
"""Connections break before a process has ended."""
_CLOSE_SECONDS = END_SECONDS + 5.0
_TAIL_LINES = 15
_TEMPORARY = ("TMPDIR", "VLLM_RPC_BASE_PATH")
"""Variables of the folder for temporary files, and of that for vLLM's sockets."""
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
"""Variable of torch's cache, which would be among the temporary files, and is to stay."""
_KILLED = {-9, 247}
"""As subprocess says it, and as the guard passes it on."""
logger = logging.getLogger(__name__)


class ServerProcess:
    """A running server."""

    def __init__(
        self,
        launch: Launch,
        *,
        title: str,
        port: int,
        host: str = LOOPBACK,
        shows_log: bool = False,
    ) -> None:
        """Start it; `wait_until_ready` is next."""
        self.url = f"http://{_EVERYWHERE.get(host, host)}:{port}"
        self._title, self._port = title, port
        self._log: IO[str] | None = None
        if not shows_log:
            self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (`close`)
        printed = _STANDARD_ERROR if self._log is None else self._log
        self._folder = Path(tempfile.mkdtemp(prefix="eyas-server-"))
        self._process = subprocess.Popen(
            [sys.executable, _GUARD, self._folder, *launch.command],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            start_new_session=True,  # signals are for us; all of its processes end with the group
            env={
                _COMPILED: f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}",
                **launch.environment,
                **dict.fromkeys(_TEMPORARY, str(self._folder)),
            },
        )

    @property
    def pid(self) -> int:
        """The process that guards the server, and leads the group of its processes."""
        return self._process.pid

    def client(self) -> httpx.Client:
        """Return a client, which knows no proxy, and opens a connection for each request."""
        return httpx.Client(
            base_url=self.url,
            timeout=_ANSWER_SECONDS,
            transport=httpx.HTTPTransport(limits=httpx.Limits(max_keepalive_connections=0)),
        )

    def wait_until_ready(self) -> None:
        """Wait as long as it loads.

        Raises:
            ConfigError: it ended instead; with the last lines that it printed.

        """
        started = reported = time.monotonic()
        with self.client() as client:
            while True:
                if self._process.poll() is not None:
                    raise ConfigError(f"{self._title} does not start: {self.last_words()}")
                if self._listens() and _is_healthy(client):
                    return
                if time.monotonic() - reported > _REPORT_SECONDS:
                    reported = time.monotonic()
                    logger.info("%s has been loading for %.0f s", self._title, reported - started)
                time.sleep(_PAUSE_SECONDS)

    def _listens(self) -> bool:
        """Return whether the port is open, and is its own: another process may have taken it."""
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
            return any(
                one.status == psutil.CONN_LISTEN and one.laddr.port == self._port
                for process in family
                for one in process.net_connections("tcp")
            )
        except psutil.NoSuchProcess:
            return False

    def wait(self) -> None:
        """Wait until it has ended, and raise TransientError: it is to serve until it is closed."""
        self._process.wait()
        self.require_alive()

    def require_alive(self) -> None:
        """Raise TransientError if it has ended, or does so in a moment."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
            raise TransientError(f"{self._title} ended while it served: {self.last_words()}")

    def last_words(self) -> str:
        """Return how it ended, and what it printed last."""
        status = self._process.poll()
        reason = f"status {status}"
        if status in _KILLED:
            reason += " (killed, by the system if memory was short)"
        if self._log is None:
            return f"{reason}; its log is above"
        self._log.seek(0)
        lines = [line.rstrip() for line in self._log if line.strip()]
        printed = "".join(f"\n  {line}" for line in lines[-_TAIL_LINES:])
        return f"{reason}{printed}"

    def close(self) -> None:
        """End it and all of its processes, and remove its temporary files.

        They are killed if they need more than `END_SECONDS` seconds.
        """
        assert self._process.stdin is not None  # noqa: S101 (PIPE was asked for)
        self._process.stdin.close()  # the guard sees it
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._log is not None:
            self._log.close()


@contextmanager
def serving(
    title: str,
    launch_on: Callable[[int], Launch],
    *,
    host: str = LOOPBACK,
    port: int | None = None,
    shows_log: bool = False,
) -> Iterator[ServerProcess]:
    """Serve until the block ends; without a `port`, on a free one.

    `launch_on` returns at once: meanwhile another process could take the port. With `shows_log`,
    the server's log goes to standard error.

    Raises:
        ConfigError: the server does not start, or the port is in use.
        TransientError: it ended within the block, which then failed.

    """
    if port is None:
        port = _free_port()
    else:
        _require_free(host, port)
    server = ServerProcess(launch_on(port), title=title, port=port, host=host, shows_log=shows_log)
    try:
        server.wait_until_ready()
        yield server
    except (httpx.TransportError, TransientError) as error:
        server.require_alive()
        raise TransientError(f"{title} does not answer: {error}") from error
    finally:
        server.close()


def _is_healthy(client: httpx.Client) -> bool:
    try:
        status = client.get("/health", timeout=_REPORT_SECONDS).status_code
    except httpx.TransportError:
        return False
    if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
        raise ConfigError(
            f"the server answers /health with {status}: does a variable of its own set another "
            "address or a key?"
        )
    return status == HTTPStatus.OK


def _require_free(host: str, port: int) -> None:
    """Raise ConfigError unless the port can be listened on."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror or error}): choose another one "
            "with --port, or another address with --host"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port
