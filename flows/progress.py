"""Progress a person sees: a bar in a terminal, log lines elsewhere, a moving artifact in the UI."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

ARTIFACT_SECONDS = 5.0
"""An update is one blocking API call: never more often than this."""
LOG_SECONDS = 15.0


class StageProgress:
    """Progress of one stage in its own unit; `advance` is cheap and may be called per item."""

    def __init__(self, bar: Progress, *, stage: str, total: int, unit: str, artifact: UUID) -> None:
        self._bar = bar
        self._stage = stage
        self._total = total
        self._unit = unit
        self._artifact = artifact
        self._row = bar.add_task(stage, total=total, unit=unit, note="")
        self._started = self._logged = self._published = time.monotonic()
        self._lock = threading.Lock()
        self.done = 0

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Count `amount` more units as done and show `note` behind them; from any thread."""
        with self._lock:
            self.move_to(self.done + amount, note=note)

    def move_to(self, done: int, *, note: str = "") -> None:
        """Set the units done."""
        self.done = done
        self._bar.update(self._row, completed=done, note=note)
        now = time.monotonic()
        if now - self._published >= ARTIFACT_SECONDS:
            self._published = now
            self.publish()
        if not self._bar.console.is_terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            rate = f"{_rate(done / (now - self._started))} {self._unit}/s"
            done_of_total = f"{done:,} of {self._total:,} {self._unit}"
            get_run_logger().info("%s: %s, %s %s", self._stage, done_of_total, rate, note)

    def publish(self) -> None:
        """Move the artifact in the Prefect UI."""
        percent = min(100.0, 100.0 * self.done / max(self._total, 1))
        update_progress_artifact(self._artifact, progress=percent)


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2f}"


@contextmanager
def stage_progress(stage: str, *, key: str, total: int, unit: str) -> Iterator[StageProgress]:
    """Show the progress of `stage` over `total` units while the block runs.

    Args:
        stage: what a person reads, such as "hidden states".
        key: artifact key in the Prefect UI, lower case with dashes: one history per key.
        total: units to do.
        unit: plural noun of what is counted.

    """
    artifact = create_progress_artifact(progress=0.0, key=key, description=f"{stage} ({unit})")
    assert isinstance(artifact, UUID)  # noqa: S101 (sync call)
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        progress = StageProgress(bar, stage=stage, total=total, unit=unit, artifact=artifact)
        yield progress
        progress.publish()
