"""The Prefect API that `eyas run` reports to: a running server, else a temporary one.

A temporary server writes to the same database, so that a server started later shows the run. Import
this module after `settle_environment`: Prefect reads its environment on import.
"""

import atexit
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

from prefect.logging.configuration import setup_logging
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    get_current_settings,
    temporary_settings,
)

import flows
from flows.errors import ServerFailedError

_FLOWS = Path(flows.__file__).parent
_HEALTH_SECONDS = 2.0
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_LAST_OUTPUT_CHARS = 500


@contextmanager
def prefect_api() -> Iterator[str | None]:
    """Provide a Prefect API while the block runs; yield the URL of a running server, else None."""
    configured = PREFECT_API_URL.value()
    if configured and _is_healthy(configured):
        yield configured
        return
    with temporary_settings({PREFECT_API_URL: _start_server()}):
        yield None


class _StandardError(logging.Handler):
    """Prints above a progress bar, which redirects standard error while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        print(self.format(record), file=sys.stderr)


def print_own_warnings() -> None:
    """Print the warnings of our own modules on standard error, in a terminal too."""
    setup_logging()  # else Prefect's first flow run would replace the handlers
    handler = _StandardError(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    _add_once(handler, ("eagle_core", "storage", "flows"))


def print_own_lines() -> None:
    """Print the log lines of our flows on standard error, without Prefect's own lines."""
    setup_logging()  # else Prefect's first flow run would replace the handlers
    handler = _StandardError()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: Path(record.pathname).is_relative_to(_FLOWS))
    _add_once(handler, ("prefect.flow_runs", "prefect.task_runs"))


def _add_once(handler: _StandardError, names: Sequence[str]) -> None:
    for name in names:
        own = logging.getLogger(name)
        if not any(isinstance(known, _StandardError) for known in own.handlers):
            own.addHandler(handler)


def _start_server() -> str:
    """Start our own server on loopback and return its API's URL.

    It runs in a separate session: Ctrl-C stops the flow, which can still report to the server. It
    ends with this process: after the last event is sent, or when this process is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    stderr = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (the server writes to it until it ends)
    server = subprocess.Popen(
        [sys.executable, "-m", "deployments.cli.temporary_server", str(port)],
        stdin=subprocess.PIPE,
        env={
            **os.environ,
            **settings,
            "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",  # goes into the file
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
        },
        stderr=stderr,
        start_new_session=True,
    )
    atexit.register(_stop, server)
    api_url = f"http://127.0.0.1:{port}/api"
    started = time.monotonic()
    while not _is_healthy(api_url):
        seconds = time.monotonic() - started
        if server.poll() is not None:
            raise ServerFailedError(
                f"Prefect's temporary server exited after {seconds:.0f} s with status "
                f"{server.returncode}. {_database()}Its last output: {_last_output(stderr)}"
            )
        if seconds > _START_SECONDS:
            raise ServerFailedError(
                f"Prefect's temporary server did not respond within {_START_SECONDS:.0f} s; start "
                "one with `make server`, or run the same command again. Its last output: "
                f"{_last_output(stderr)}"
            )
        time.sleep(0.1)
    return api_url


def _database() -> str:
    """Return advice on a database that Prefect cannot use."""
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if not url or not url.startswith("sqlite"):
        return "Check PREFECT_API_DATABASE_CONNECTION_URL. " if url else ""
    path = url.partition(":///")[2]
    return (
        f"If the error is about the database, {path} is damaged or from another version of "
        "Prefect: move it away and run the same command again (only the list of past runs is lost, "
        "no data of Eyas), or set PREFECT_HOME to another folder. "
    )


def _last_output(stderr: IO[bytes]) -> str:
    """Return the last error in a server's standard error, else the end of the output."""
    stderr.seek(0)
    text = stderr.read().decode(errors="replace").strip()
    errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*$", text, flags=re.MULTILINE)
    return errors[-1] if errors else text[-_LAST_OUTPUT_CHARS:] or "none"


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _is_healthy(api_url: str) -> bool:
    try:
        with urlopen(f"{api_url}/health", timeout=_HEALTH_SECONDS) as answer:  # noqa: S310 (http)
            return bool(answer.status == 200)
    except (URLError, OSError, ValueError):
        return False
