"""`metrics.jsonl` in the folder of a run: every metric, whichever trackers are selected.

One JSON line per call: `{"step": 20, "time": 1790000000.0, "metrics": {"loss": 2.5}}`; a metric
that is not finite is null. Reports and plots read this file. Earlier versions wrote metrics only to
TensorBoard's event files, which are imported.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from eagle_core.atomic_files import write_text
from eagle_core.tracking.event_files import TENSORBOARD_FOLDER, read_event_files

METRICS_NAME = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends to the metrics of a run; a failing disk loses metrics, but never stops training."""

    def __init__(self, run_path: Path) -> None:
        """Open the file of the run in `run_path`; import the metrics of earlier versions."""
        self._path = run_path / METRICS_NAME
        self._file: FileIO | None = None
        """None once it has failed."""
        try:
            if not self._path.exists():
                write_text(self._path, "".join(_former_lines(run_path)))
            self._file = self._path.open("a+b", buffering=0)
            _end_torn_line(self._file)
        except OSError as error:
            self._disable(error)

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step`."""
        if self._file is None:
            return
        try:
            self._file.write(_line(scalars, step=step, when=time.time()).encode())
        except OSError as error:
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        self._close()
        logger.warning(
            "%s cannot be written (%s); training continues without it", self._path, error
        )

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def read_metrics(run_path: Path) -> Mapping[str, Mapping[int, float]]:
    """Return each metric of a run by ascending step; for a step that ran twice, the last value.

    A line that a kill or a full disk cut short is skipped.
    """
    path = run_path / METRICS_NAME
    if not path.exists():
        return read_event_files(run_path / TENSORBOARD_FOLDER)
    found: dict[str, dict[int, float]] = {}
    with path.open("rb") as file:
        for line in file:
            try:
                document = json.loads(line)
                step, metrics = int(document["step"]), dict(document["metrics"])
            except (ValueError, TypeError, LookupError):
                continue
            for name, value in metrics.items():
                found.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return {name: dict(sorted(by_step.items())) for name, by_step in found.items()}


def _end_torn_line(file: FileIO) -> None:
    """End the line that a kill may have cut short."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _former_lines(run_path: Path) -> Iterator[str]:
    """Yield the metrics that an earlier version wrote only for TensorBoard."""
    former = read_event_files(run_path / TENSORBOARD_FOLDER)
    for step in sorted({step for by_step in former.values() for step in by_step}):
        at_step = {name: by_step[step] for name, by_step in former.items() if step in by_step}
        yield _line(at_step, step=step, when=0.0)


def _line(scalars: Mapping[str, float], *, step: int, when: float) -> str:
    metrics = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    return json.dumps({"step": step, "time": when, "metrics": metrics}) + "\n"
