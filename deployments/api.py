"""The Prefect API that `eyas run` reports to: a running server, else a temporary one.

A run reported to a temporary server lands in the same database, so that a server started later
shows it. Import this after `settle_environment`: Prefect reads its environment when it is imported.
"""

import atexit
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from prefect.logging.configuration import setup_logging
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

import flows
from eagle_core.errors import TransientError

_FLOWS = Path(flows.__file__).parent
_HEALTH_SECONDS = 2.0
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0


@contextmanager
def prefect_api() -> Iterator[str | None]:
    """Serve a Prefect API while the block runs; yield a running server's URL, None if temporary."""
    configured = PREFECT_API_URL.value()
    if configured and _is_healthy(configured):
        yield configured
        return
    with temporary_settings({PREFECT_API_URL: _start_server()}):
        yield None


def print_own_lines() -> None:
    """Print on standard error what our flows log, and nothing that Prefect itself does."""
    setup_logging()  # else its first flow run would replace the handlers
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: Path(record.pathname).is_relative_to(_FLOWS))
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(handler)


def _start_server() -> str:
    """Start a server of our own on loopback and return its API's URL.

    It has a session of its own: Ctrl-C stops the flow, which then still has somewhere to report to.
    It ends when this process does, after the last event is out.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
            *("--host", "127.0.0.1", "--port", str(port), "--log-level", "error"),
        ],
        env={
            **os.environ,
            **settings,
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
        },
        start_new_session=True,
    )
    atexit.register(_stop, server)
    api_url = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + _START_SECONDS
    while not _is_healthy(api_url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise TransientError(
                f"Prefect's temporary server did not answer within {_START_SECONDS:.0f} s (exit "
                f"status {server.poll()}); see its lines above, or start one with `make server`"
            )
        time.sleep(0.1)
    return api_url


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
