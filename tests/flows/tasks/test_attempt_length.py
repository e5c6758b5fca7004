"""What a run that goes on says about its learning rate."""

import logging
from typing import Literal

import numpy as np
import pytest

from eagle_core.training.config import TrainingConfig
from eagle_core.training.pieces import WHOLE
from eagle_core.training.schedule import RunSteps, new_decay, resumed_decay
from flows.tasks.attempt_length import _tell


@pytest.mark.parametrize(("schedule", "is_told"), [("constant", False), ("cosine", True)])
def test_a_longer_run_says_where_its_rate_decays_if_it_does(
    schedule: Literal["constant", "cosine"], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flows")

    def steps(max_steps: int, done: int = 0) -> RunSteps:
        config = TrainingConfig(schedule=schedule, max_steps=max_steps, extend="restretch")
        ones = np.ones(10, dtype=np.int64)
        return RunSteps(config=config, lengths=ones, groups=ones - 1, windows=WHOLE, step=done)

    before, longer = new_decay(steps(100)), steps(200, done=60)
    _tell("run", longer, before, resumed_decay(longer, before))
    assert ("decays until step 200" in caplog.text) == is_told
    assert bool(caplog.text) == is_told
