"""Scalars in TensorBoard's event files, the only place where earlier versions kept metrics."""

from collections.abc import Mapping
from pathlib import Path

TENSORBOARD_FOLDER = "tensorboard"
"""Below the folder of a run."""
_ALL_SCALARS = {"scalars": 0}


def read_event_files(folder: Path) -> Mapping[str, Mapping[int, float]]:
    """Return each scalar by step; for a step that ran twice, the last value.

    The time of an event decides which is last: file names sort differently if two files were
    started within one second.
    """
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415 (rare)
        EventAccumulator,
    )

    events = EventAccumulator(str(folder), size_guidance=_ALL_SCALARS)
    events.Reload()
    found: dict[str, Mapping[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        in_time = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
        by_step = {event.step: event.value for event in in_time}
        found[tag] = dict(sorted(by_step.items()))
    return found
