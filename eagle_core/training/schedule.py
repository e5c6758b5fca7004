"""The learning rate as a pure function of the step, and the steps over which it decays.

Invariant: no choice of processes, batches or length raises the rate of a run that resumes, and only
a run that is made shorter has a rate that jumps: down.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from eagle_core.errors import MismatchError
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import LoaderState, StepShape, count_steps
from eagle_core.training.pieces import Windows
from eagle_core.training.position_draws import PositionDraws


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """How long a run is, as its settings say it."""

    epochs: int
    max_steps: int | None = None
    """If set, `epochs` does not matter."""

    @classmethod
    def of(cls, config: TrainingConfig) -> Self:
        """Return the length that the settings ask for."""
        return cls(epochs=config.epochs, max_steps=config.max_steps)

    def __str__(self) -> str:
        """Return it as settings."""
        if self.max_steps is not None:
            return f"training.max_steps={self.max_steps}"
        return f"training.epochs={self.epochs}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """What another file records of a run whose checkpoint has no `Decay`."""

    length: RunLength
    num_steps: int | None = None
    """That it would take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decay:
    """The steps over which the rate decays; recorded in every checkpoint."""

    length: RunLength
    """Of the run that it is laid out for."""
    horizon: int
    """Step from which on the rate is the final one."""
    first_step: int
    """Step where it, or what is left of it, begins."""
    first_done: float = 0.0
    """Share of it that is done there."""
    allowed: RunLength
    """Longest run that was agreed to; longer than `length` if the schedule was kept."""

    def done(self, step: int) -> float:
        """Return the share of the decay that is done at `step`, 0 to 1."""
        span = max(1, self.horizon - self.first_step)
        share = min(1.0, max(0, step - self.first_step) / span)
        return self.first_done + (1.0 - self.first_done) * share

    def stretched(self, step: int, horizon: int) -> Self:
        """Return it with what is left at `step` spread over the steps up to `horizon`."""
        if step <= self.first_step:
            return dataclasses.replace(self, horizon=horizon)
        return dataclasses.replace(
            self, first_step=step, first_done=self.done(step), horizon=horizon
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSteps:
    """Counts the steps of a run from where it is, as its samples are packed."""

    config: TrainingConfig
    lengths: NDArray[np.int64]
    """[N] of the samples"""
    groups: NDArray[np.int64]
    """[N]"""
    windows: Windows
    """How samples are divided."""
    world_size: int = 1
    step: int = 0
    """Steps that are done."""
    loader: LoaderState | None = None
    """After these; None at the start of the data."""

    def last(self, length: RunLength | None = None) -> int:
        """Return the number of steps, done ones included, at the end of a run of this length.

        Args:
            length: by default that of the settings.

        """
        length = RunLength.of(self.config) if length is None else length
        if length.max_steps is not None:
            return length.max_steps
        shape = step_shape(self.config, self.windows, world_size=self.world_size)
        return self.step + count_steps(
            self.lengths,
            self.groups,
            shape,
            seed=self.config.seed,
            epochs=length.epochs,
            after=self.loader,
        )


def step_shape(
    config: TrainingConfig, windows: Windows, *, rank: int = 0, world_size: int = 1
) -> StepShape:
    """Return how the batches of a run's steps are formed and distributed."""
    return StepShape(
        window=config.shuffle_window,
        batch_tokens=config.batch_tokens,
        windows=windows,
        batches_per_step=config.batches_per_step,
        rank=rank,
        world_size=world_size,
        draws=PositionDraws.of(config),
    )


def new_decay(run: RunSteps) -> Decay:
    """Return the decay over the whole of a run, after its warm-up."""
    wanted = RunLength.of(run.config)
    return Decay(
        length=wanted,
        horizon=run.last(),
        first_step=run.config.warmup_steps,
        allowed=wanted,
    )


def recorded_decay(run: RunSteps, planned: PlannedRun | None) -> Decay:
    """Return the decay of a run whose checkpoint is older than its record."""
    decay = new_decay(run)
    if planned is None:
        return decay
    horizon = run.last(planned.length) if planned.num_steps is None else planned.num_steps
    return dataclasses.replace(
        decay, length=planned.length, horizon=horizon, allowed=planned.length
    )


def resumed_decay(run: RunSteps, before: Decay) -> Decay:
    """Return the decay of a run that resumes, whose last checkpoint recorded `before`.

    The same length may take other steps with other processes or batches: what is left of the decay
    is then spread over what is left of the run. A longer run needs `training.extend`. A shorter one
    has the decay of a run that was as short from its start.

    Raises:
        MismatchError: the run is longer than agreed to, and `extend` is not set.

    """
    config, step, wanted = run.config, run.step, RunLength.of(run.config)
    last = run.last()
    if step >= last:
        return before
    if config.schedule == "constant":
        return new_decay(run)
    own_last = run.last(before.length)
    if own_last != before.horizon and before.done(step) < 1:
        before = before.stretched(step, own_last)
    horizon = max(before.horizon, own_last)
    if last == horizon:
        return dataclasses.replace(before, length=wanted, allowed=wanted)
    if last < horizon:
        return _shortened(run, before)
    if config.extend == "restretch":
        longer = before.stretched(step, last)
        return dataclasses.replace(longer, length=wanted, allowed=wanted)
    if config.extend is None and last > run.last(before.allowed):
        raise MismatchError(_question(run, before))
    return before if config.extend is None else dataclasses.replace(before, allowed=wanted)


def _shortened(run: RunSteps, before: Decay) -> Decay:
    """Return the decay of a run that was as short from its start, unless its rate is higher."""
    anew = new_decay(run)
    if anew.done(run.step) >= before.done(run.step):
        return anew
    shorter = before.stretched(run.step, anew.horizon)
    return dataclasses.replace(shorter, length=anew.length, allowed=anew.length)


def _question(run: RunSteps, before: Decay) -> str:
    last, config = run.last(), run.config
    rate = learning_rate(config, run.step, before)
    final = learning_rate(config, before.horizon, before)
    return (
        f"the run has done {run.step:,} steps, its learning rate decays over "
        f"{before.horizon:,} ({before.length}), and {last:,} are asked for "
        f"({RunLength.of(config)}). Choose what its rate does: training.extend=keep leaves the "
        f"schedule as it is, so that the rate reaches {final:.2g} at step {before.horizon:,} and "
        f"stays there; training.extend=restretch goes on from the present rate, {rate:.2g}, and "
        f"spreads what is left of the decay over the {last - run.step:,} steps to come. Give it "
        "with --set, or in the recipe; or keep the old length, or train another run (--run), which "
        "may start from this run's draft (training.start)"
    )


def learning_rate(config: TrainingConfig, step: int, decay: Decay) -> float:
    """Return the rate of `step` (from 0): linear warm-up to the peak, then the configured decay."""
    peak = config.peak_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    done = decay.done(step)
    remaining = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[
        config.schedule
    ]
    return peak * (config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining)
