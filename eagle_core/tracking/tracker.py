"""Where figures go while a draft trains. A tracker is told scalars by name and step."""

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Takes scalars."""

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step`."""


class NoTracker:
    """Keeps nothing: of every process of a run but the first."""

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Forget `scalars`."""
