"""Where figures go while a draft trains. A tracker is told scalars by name and step."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"
"""Below the folder of a run."""


class Tracker(Protocol):
    """Takes scalars."""

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step`."""


class NoTracker:
    """Keeps nothing: of every process of a run but the first."""

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Forget `scalars`."""


class TensorBoardTracker:
    """Writes TensorBoard event files below one folder."""

    def __init__(self, path: Path) -> None:
        self._writer = SummaryWriter(str(path))

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        """Return the tracker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is pending and close the file."""
        self._writer.close()
