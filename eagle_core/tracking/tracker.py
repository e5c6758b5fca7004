"""The interface of trackers, which record scalars by name and step while a draft trains."""

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Records scalars."""

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step`."""


class NoTracker:
    """Records nothing: for every process of a run but the first."""

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Discard `scalars`."""
