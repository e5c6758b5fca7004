"""Progress display: a bar in a terminal, log lines elsewhere, a progress artifact in the UI."""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import create_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
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

from flows.orchestration.best_effort import best_effort

logger = logging.getLogger(__name__)

ARTIFACT_SECONDS = 5.0
"""Minimum time between updates: each is one API call."""
LAST_UPDATE_SECONDS = 10.0
"""How long the end of a stage waits for its last update."""
LOG_SECONDS = 15.0


class StageProgress:
    """Progress of one stage in its own unit; `advance` is cheap and may be called per item."""

    def __init__(self, bar: Progress, *, stage: str, total: int, unit: str) -> None:
        self._bar = bar
        self.stage = stage
        self._total = total
        self._unit = unit
        self._row = bar.add_task(stage, total=total, unit=unit, note="")
        self._started = self._logged = time.monotonic()
        self._lock = threading.Lock()
        self.done = 0

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Count `amount` more units as done and show `note` after them; from any thread."""
        with self._lock:
            self.move_to(self.done + amount, note=note)

    def move_to(self, done: int, *, note: str = "") -> None:
        """Set the units done."""
        self.done = done
        self._bar.update(self._row, completed=done, note=note)
        now = time.monotonic()
        if not self._bar.console.is_terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            rate = f"{_rate(done / (now - self._started))} {self._unit}/s"
            done_of_total = f"{done:,} of {self._total:,} {self._unit}"
            get_run_logger().info("%s: %s, %s %s", self.stage, done_of_total, rate, note)

    @property
    def percent(self) -> float:
        """How much is done."""
        return min(100.0, 100.0 * self.done / max(self._total, 1))


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2f}"


@contextmanager
def stage_progress(stage: str, *, key: str, total: int, unit: str) -> Iterator[StageProgress]:
    """Show the progress of `stage` over `total` units while the block runs.

    Args:
        stage: the displayed name, such as "hidden states".
        key: artifact key in the Prefect UI, lower case with dashes: one history per key.
        total: units to do.
        unit: plural noun of what is counted.

    """
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
        progress = StageProgress(bar, stage=stage, total=total, unit=unit)
        with _shown_in_ui(progress, key, description=f"{stage} ({unit})"):
            yield progress


@contextmanager
def moving(artifact: UUID) -> Iterator[Callable[[float], object]]:
    """Yield a function that sets the percentage of a progress artifact, from any thread.

    It has its own client: the flow's is closed when the flow ends, even if a thread still uses it.
    """
    with get_client(httpx_settings={}, sync_client=True) as client:
        yield lambda percent: client.update_artifact(artifact, ArtifactUpdate(data=percent))


@contextmanager
def _shown_in_ui(progress: StageProgress, key: str, *, description: str) -> Iterator[None]:
    """Create and update the artifact in a thread: work never waits for an unreachable server."""
    ended = threading.Event()

    def follow() -> None:
        artifact = create_progress_artifact(progress=0.0, key=key, description=description)
        assert isinstance(artifact, UUID)  # noqa: S101 (sync call)
        shown, is_last = 0.0, False
        with moving(artifact) as move:
            while not is_last:
                is_last = ended.wait(ARTIFACT_SECONDS)
                if progress.percent != shown:
                    shown = progress.percent
                    try:
                        move(shown)
                    except Exception as error:  # noqa: BLE001 (only the display is old)
                        logger.debug("progress is not shown: %s", error)

    def follow_if_possible() -> None:
        with best_effort(f"progress of {progress.stage}"):
            follow()

    context = contextvars.copy_context()  # knows the flow run and its server
    follower = threading.Thread(
        target=context.run,
        args=(follow_if_possible,),
        name=f"progress of {progress.stage}",
        daemon=True,
    )
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join(LAST_UPDATE_SECONDS)
