"""Fixtures that several rooms share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.closing import (  # noqa: F401 (hooks)
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_SERVER_LEVEL", "CRITICAL")
os.environ["HF_HUB_OFFLINE"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell script that runs the tests in its background has them, and their children, ignore
    # SIGINT. Prefect ends its servers and workers by SIGINT: each would take 30 seconds to kill.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 8-layer Llama with tokenizer and chat template."""
    from tests import tiny  # storage's tests run without torch, as storage does

    return tiny.write_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """Serve a real Prefect API from a temporary database; return its URL."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):
        yield PREFECT_API_URL.value()
