"""How long an attempt trains, and what becomes of the learning rate of a run that resumes."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eagle_core.draft.config import DraftConfig
from eagle_core.training.config import TrainingConfig
from eagle_core.training.pieces import Windows
from eagle_core.training.schedule import (
    Decay,
    PlannedRun,
    RunLength,
    RunSteps,
    learning_rate,
    recorded_decay,
    resumed_decay,
)
from flows.bridge.first_weights import as_begun
from flows.bridge.run import BegunRun
from flows.reports.run_record import RunRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptLength:
    """The length of an attempt."""

    total: int
    """Steps of the run at its end, those of earlier attempts included."""
    planned: PlannedRun | None = None
    """What the run's files record of it, for a checkpoint of an earlier version."""


def attempt_length(
    run_path: Path,
    training: TrainingConfig,
    draft: DraftConfig,
    begun: BegunRun | None,
    lengths: NDArray[np.int64],
    groups: NDArray[np.int64],
) -> AttemptLength:
    """Return how long an attempt trains; say what that means for a run that has begun.

    Raises:
        MismatchError: the run is longer than it was, and `training.extend` is not set.

    """
    config = as_begun(training, run_path)
    steps = RunSteps(
        config=config,
        lengths=lengths,
        groups=groups,
        windows=Windows.of(config, draft),
        world_size=training.world_size,
        step=begun.step if begun else 0,
        loader=begun.loader if begun else None,
    )
    total = steps.last()
    if begun is None:
        return AttemptLength(total=total)
    planned = _planned(run_path, begun)
    if steps.step >= total:
        logger.warning(
            "run %s has done %s steps, and %s are requested: there is nothing to do",
            *(run_path.name, f"{steps.step:,}", f"{total:,}"),
        )
        return AttemptLength(total=total, planned=planned)
    before = begun.decay or recorded_decay(steps, planned)
    _tell(run_path.name, steps, before, resumed_decay(steps, before))
    return AttemptLength(total=total, planned=planned)


def _planned(run_path: Path, begun: BegunRun) -> PlannedRun | None:
    """Return what `run.json` and the settings of the last attempt record of a run's length."""
    if begun.record is None:
        return None
    settings = RunRecord.read(run_path).settings
    return PlannedRun(
        length=RunLength.of(begun.record.training),
        num_steps=None if settings is None else settings.total_steps,
    )


def _tell(name: str, steps: RunSteps, before: Decay, after: Decay) -> None:
    """Say where the learning rate jumps or decays over other steps than before."""
    if steps.config.schedule == "constant":
        return
    rates = [learning_rate(steps.config, steps.step, decay) for decay in (before, after)]
    if rates[0] != rates[1]:
        logger.warning(
            "run %s was planned with %s steps and now has %s: its learning rate jumps from %.2g to "
            "%.2g at step %s (a new run with %s steps has no such jump)",
            *(name, f"{before.horizon:,}", f"{after.horizon:,}", *rates),
            *(f"{steps.step:,}", f"{after.horizon:,}"),
        )
    elif before.horizon not in {after.horizon, steps.last()} or after.horizon != steps.last():
        logger.info(
            "run %s goes on at step %s of %s: its learning rate, now %.2g, decays until step %s",
            *(name, f"{steps.step:,}", f"{steps.last():,}", rates[1], f"{after.horizon:,}"),
        )
