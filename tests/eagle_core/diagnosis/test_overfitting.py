"""Overfitting a few texts needs all of their positions, whatever the run's settings."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from eagle_core.diagnosis import overfitting
from eagle_core.training.config import TrainingConfig
from tests.eagle_core.random_source import RandomSource


def test_all_positions_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[TrainingConfig] = []

    def train(*, config: TrainingConfig, **_: Any) -> MagicMock:
        used.append(config)
        return MagicMock(stopped=False)

    monkeypatch.setattr(overfitting, "train", train)
    states = [RandomSource().fetch(index) for index in range(2)]
    own = TrainingConfig(max_positions_per_sample=1, loss_reduction="sequence", seed=7)
    training = overfitting._training(
        MagicMock(), MagicMock(), own, states, tmp_path, lambda _step: None
    )
    next(training)
    (config,) = used
    assert config.max_positions_per_sample is None
    assert (config.seed, config.loss_reduction) == (7, "sequence")
    assert config.batch_tokens == sum(map(len, states))
