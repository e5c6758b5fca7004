"""TensorBoard event files in the folder of a run."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from eagle_core.tracking.config import TrackedRun, TrackingConfig
from eagle_core.tracking.event_files import TENSORBOARD_FOLDER


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
        """Write pending events and close the file."""
        self._writer.close()


def open_tracker(_config: TrackingConfig, run: TrackedRun) -> TensorBoardTracker:
    """Return the tracker that writes below the run's folder."""
    return TensorBoardTracker(run.path / TENSORBOARD_FOLDER)
