"""A server of an engine on this machine: started on loopback, waited for, and ended from here."""

import logging
import os
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

LOOPBACK = "127.0.0.1"
_GUARD = Path(__file__).with_name("guard.py")
_PAUSE_SECONDS = 0.2
_REPORT_SECONDS = 30.0
_ANSWER_SECONDS = 3600.0
"""For one text: a large target on a CPU, with others before it."""
_END_SECONDS = 3.0
"""Connections break before a process has ended."""
_TAIL_LINES = 15
_KILLED = {-9, 247}
"""As subprocess says it, and as the guard passes it on."""
logger = logging.getLogger(__name__)


class ServerProcess:
    """A running server."""

    def __init__(self, launch: Launch, *, title: str, port: int) -> None:
        """Start it; `wait_until_ready` is next."""
        self.url = f"http://{LOOPBACK}:{port}"
        self._title, self._port = title, port
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (`close`)
        self._process = subprocess.Popen(
            [sys.executable, _GUARD, *launch.command],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # signals are for us; all of its processes end with the group
            env=dict(launch.environment),
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
                for one in process.net_connections("tcp4")
            )
        except psutil.NoSuchProcess:
            return False

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
        self._log.seek(0)
        lines = [line.rstrip() for line in self._log if line.strip()]
        printed = "".join(f"\n  {line}" for line in lines[-_TAIL_LINES:])
        return f"{reason}{printed}"

    def close(self) -> None:
        """End it and all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError), self._process:
            pass
        self._log.close()


@contextmanager
def serving(title: str, launch_on: Callable[[int], Launch]) -> Iterator[ServerProcess]:
    """Serve on a free port of the loopback address until the block ends.

    `launch_on` returns at once: meanwhile another process could take the port.

    Raises:
        ConfigError: the server does not start.
        TransientError: it ended within the block, which then failed.

    """
    port = _free_port()
    server = ServerProcess(launch_on(port), title=title, port=port)
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port
