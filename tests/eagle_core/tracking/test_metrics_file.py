"""A run's own metrics: appended, read back, and taken over from TensorBoard's event files."""

import json
import math
from pathlib import Path

import pytest

from eagle_core.tracking.config import TrackedRun, TrackingConfig
from eagle_core.tracking.event_files import TENSORBOARD_FOLDER
from eagle_core.tracking.metrics_file import METRICS_NAME, MetricsFile, read_metrics
from eagle_core.tracking.tensorboard import TensorBoardTracker
from eagle_core.tracking.trackers import open_trackers


def _write_event_files(folder: Path) -> None:
    """Write two attempts; the names of their files sort in the other order."""
    for steps, loss, name in (((1, 2, 3), 9.0, "10"), ((2, 3, 4), 5.0, "1")):
        before = set(folder.iterdir()) if folder.exists() else set()
        with TensorBoardTracker(folder) as tracker:
            for step in steps:
                tracker.log({"loss": loss - step}, step=step)
        (written,) = set(folder.iterdir()) - before
        written.rename(folder / f"events.out.tfevents.{name}")


def test_every_metric_is_kept_whatever_trackers_are_chosen(tmp_path: Path) -> None:
    run = TrackedRun(name="main", path=tmp_path, settings={})
    with open_trackers(TrackingConfig(trackers=()), run) as tracker:
        tracker.log({"loss": 2.5, "held_out/accuracy_1": math.nan}, step=10)
        tracker.log({"loss": 2.25}, step=20)
    found = read_metrics(tmp_path)
    assert found["loss"] == {10: 2.5, 20: 2.25}
    assert math.isnan(found["held_out/accuracy_1"][10])
    lines = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[0]["metrics"]["held_out/accuracy_1"] is None
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_NAME]


def test_of_a_step_that_was_done_twice_the_last_value_counts(tmp_path: Path) -> None:
    for steps, loss in (((1, 2, 3), 9.0), ((2, 3, 4), 5.0)):
        with MetricsFile(tmp_path) as metrics:
            for step in steps:
                metrics.log({"loss": loss - step}, step=step)
    assert read_metrics(tmp_path)["loss"] == {1: 8.0, 2: 3.0, 3: 2.0, 4: 1.0}


def test_a_line_that_a_kill_cut_short_costs_that_line_alone(tmp_path: Path) -> None:
    with MetricsFile(tmp_path) as metrics:
        metrics.log({"loss": 3.0}, step=1)
        metrics.log({"loss": 2.0}, step=2)
    path = tmp_path / METRICS_NAME
    path.write_bytes(path.read_bytes()[:-9])
    assert read_metrics(tmp_path)["loss"] == {1: 3.0}
    with MetricsFile(tmp_path) as metrics:
        metrics.log({"loss": 1.0}, step=3)
    assert read_metrics(tmp_path)["loss"] == {1: 3.0, 3: 1.0}


def test_metrics_of_an_earlier_version_are_read_and_taken_over(tmp_path: Path) -> None:
    _write_event_files(tmp_path / TENSORBOARD_FOLDER)
    expected = {1: 8.0, 2: 3.0, 3: 2.0, 4: 1.0}
    assert read_metrics(tmp_path)["loss"] == expected
    with MetricsFile(tmp_path) as metrics:
        metrics.log({"loss": 0.5}, step=5)
    assert read_metrics(tmp_path)["loss"] == {**expected, 5: 0.5}


def test_a_disk_that_refuses_costs_the_metrics_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / METRICS_NAME).mkdir()
    with MetricsFile(tmp_path) as metrics:
        metrics.log({"loss": 3.0}, step=1)
        metrics.log({"loss": 2.0}, step=2)
    (warning,) = caplog.messages
    assert "training continues without it" in warning


def test_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    with MetricsFile(tmp_path) as metrics:
        metrics.log({"loss": 3.0}, step=1)
        metrics.log({"loss": 2.0}, step=2)
    (warning,) = caplog.messages
    assert "No space left" in warning
