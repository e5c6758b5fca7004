"""The `eyas` command: in a process of its own as a person meets it, or in this one, faster."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

from typer.testing import CliRunner

from deployments.cli import app
from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What a command printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


def eyas(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, in the repository root."""
    return subprocess.run(
        [sys.executable, "-m", "deployments", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=LIMIT_SECONDS,
    )


def eyas_here(*arguments: str) -> Ended:
    """Run the command in this process; an error that it does not expect is raised."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with mock.patch.dict(os.environ):
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Ended(returncode=result.exit_code, stdout=result.stdout, stderr=result.stderr)
