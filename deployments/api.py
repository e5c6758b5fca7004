"""The Prefect API that `eyas run` reports to: a running server, else a temporary one.

A run reported to a temporary server lands in the same database, so that a server started later
shows it. Import this after `settle_environment`: Prefect reads its environment when it is imported.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from prefect.logging.configuration import setup_logging
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings

import flows

_FLOWS = Path(flows.__file__).parent
_HEALTH_SECONDS = 2.0
_START_SECONDS = 120


@contextmanager
def prefect_api() -> Iterator[str | None]:
    """Serve a Prefect API while the block runs; yield a running server's URL, None if temporary."""
    configured = PREFECT_API_URL.value()
    if configured and _is_healthy(configured):
        yield configured
        return
    server = SubprocessASGIServer()
    server.start(
        timeout=_START_SECONDS
    )  # stops at exit of the process, after the last event is out
    with temporary_settings({PREFECT_API_URL: server.api_url}):
        yield None


def print_own_lines() -> None:
    """Print on standard error what our flows log, and nothing that Prefect itself does."""
    setup_logging()  # else its first flow run would replace the handlers
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: Path(record.pathname).is_relative_to(_FLOWS))
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(handler)


def _is_healthy(api_url: str) -> bool:
    try:
        with urlopen(f"{api_url}/health", timeout=_HEALTH_SECONDS) as answer:  # noqa: S310 (http)
            return bool(answer.status == 200)
    except (URLError, OSError, ValueError):
        return False
