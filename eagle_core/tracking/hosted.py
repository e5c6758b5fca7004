"""What trackers of other packages have in common: Weights & Biases, SwanLab and MLflow.

A package is imported only when its tracker is chosen. `offline` writes files and opens no
connection; `online` takes addresses and credentials from where each package looks for them (its
environment variables, its login file), never from a recipe. A run goes on in the hosted run of the
same name. A tracker that fails while a draft trains is given up with one warning: it never stops
training.
"""

import importlib
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, Self

import xxhash

from eagle_core.errors import ConfigError
from eagle_core.tracking.config import TrackedRun, TrackingConfig

logger = logging.getLogger(__name__)


def hosted_run_id(name: str) -> str:
    """Return an id that every service takes, the same whenever a run has the same name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:48]
    return plain if plain == name else f"{plain}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"


class HostedTracker(ABC):
    """A tracker of a package that may fail: on the way it is given up, at the start it may not."""

    name: ClassVar[str]
    quiet: ClassVar[Mapping[str, str]] = {}
    """Environment that turns a package's own telemetry off, unless the user set it."""
    failures: tuple[type[Exception], ...]
    """What the package raises on purpose, and what a lost connection looks like."""

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        self._is_lost = False
        for variable, value in self.quiet.items():
            os.environ.setdefault(variable, value)
        self._package: Any = importlib.import_module(self.name)
        self.failures = self._failures()
        try:
            self._open(config, run)
        except self.failures as error:
            raise ConfigError(
                f"tracker {self.name} cannot be opened: {_first_line(error)}. See to its login or "
                "address, set tracking.mode=offline, or take it out of tracking.trackers"
            ) from error

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step`, unless this tracker has failed before."""
        if self._is_lost:
            return
        try:
            self._send(scalars, step)
        except self.failures as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        """Return the tracker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is pending and say how the run ended."""
        if self._is_lost:
            return
        try:
            self._close(is_good=kind is None)
        except self.failures as failure:
            self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        self._is_lost = True
        logger.warning(
            "tracker %s failed (%s); training goes on without it", self.name, _first_line(error)
        )

    @abstractmethod
    def _failures(self) -> tuple[type[Exception], ...]: ...

    @abstractmethod
    def _open(self, config: TrackingConfig, run: TrackedRun) -> None: ...

    @abstractmethod
    def _send(self, scalars: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def _close(self, *, is_good: bool) -> None: ...


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
