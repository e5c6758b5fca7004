"""The Prefect API that `eyas run` reports to: a running server, else a temporary one.

A run reported to a temporary server lands in the same database, so that a server started later
shows it. Import this after `settle_environment`: Prefect reads its environment when it is imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings

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


def _is_healthy(api_url: str) -> bool:
    try:
        with urlopen(f"{api_url}/health", timeout=_HEALTH_SECONDS) as answer:  # noqa: S310 (http)
            return bool(answer.status == 200)
    except (URLError, OSError, ValueError):
        return False
