"""The learning rate as a pure function of the step, and the number of steps."""

import math

import numpy as np
from numpy.typing import NDArray

from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import StepShape, count_steps


def total_steps(
    config: TrainingConfig,
    lengths: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    world_size: int = 1,
) -> int:
    """Return the number of steps of a run over samples with these lengths and groups [N]."""
    if config.max_steps is not None:
        return config.max_steps
    shape = step_shape(config, world_size=world_size)
    return count_steps(lengths, groups, shape, seed=config.seed, epochs=config.epochs)


def step_shape(config: TrainingConfig, *, rank: int = 0, world_size: int = 1) -> StepShape:
    """Return how the batches of a run's steps are formed and distributed."""
    return StepShape(
        window=config.shuffle_window,
        batch_tokens=config.batch_tokens,
        batches_per_step=config.batches_per_step,
        rank=rank,
        world_size=world_size,
    )


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Return the rate of `step` (from 0): linear warm-up to the peak, then the configured decay."""
    peak = config.peak_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    span = max(1, total_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    if config.schedule == "constant":
        return peak
    return peak * (config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining)
