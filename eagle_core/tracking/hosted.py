"""The common base of trackers from other packages: Weights & Biases, SwanLab and MLflow.

A package is imported only when its tracker is selected. `offline` writes files and opens no
connection; `online` takes addresses and credentials from where each package looks for them (its
environment variables, its login file), never from a recipe. A resumed run continues the hosted run
of the same name. A tracker that fails while a draft trains is disabled with one warning: it never
stops training.
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
    """Return an id that every service accepts; runs of the same name have the same id."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:48]
    return plain if plain == name else f"{plain}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"


class HostedTracker(ABC):
    """A tracker of another package: a failure to open is an error, a later one disables it."""

    name: ClassVar[str]
    quiet: ClassVar[Mapping[str, str]] = {}
    """Environment variables that turn off a package's own telemetry, unless the user set them."""
    failures: tuple[type[Exception], ...]
    """Exceptions that the package raises on purpose, and those of a lost connection."""

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        self._is_disabled = False
        for variable, value in self.quiet.items():
            os.environ.setdefault(variable, value)
        self._package: Any = importlib.import_module(self.name)
        self.failures = self._failures()
        try:
            self._open(config, run)
        except self.failures as error:
            raise ConfigError(
                f"tracker {self.name} cannot be opened: {_first_line(error)}. Check its login or "
                "address, set tracking.mode=offline, or remove it from tracking.trackers"
            ) from error

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step`, unless this tracker has failed before."""
        if self._is_disabled:
            return
        try:
            self._send(scalars, step)
        except self.failures as error:
            self._disable(error)

    def __enter__(self) -> Self:
        """Return the tracker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write pending metrics and report how the run ended."""
        if self._is_disabled:
            return
        try:
            self._close(is_good=kind is None)
        except self.failures as failure:
            self._disable(failure)

    def _disable(self, error: Exception) -> None:
        self._is_disabled = True
        logger.warning(
            "tracker %s failed (%s); training continues without it", self.name, _first_line(error)
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
