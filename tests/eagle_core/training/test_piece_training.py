"""Runs whose samples are longer than their batches."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_core.errors import MismatchError
from eagle_core.training import checkpoint, trainer
from eagle_core.training.checkpoint import STATE
from eagle_core.training.config import WHOLE_SAMPLES, TrainingConfig
from eagle_core.training.optimizer_step import OptimizerStep
from eagle_core.training.packing import PackedBatch
from eagle_core.training.pieces import Windows
from eagle_core.training.schedule import RunSteps
from eagle_core.training.throughput import ThroughputMeter
from tests.eagle_core.long_source import long_source
from tests.eagle_core.random_source import random_draft
from tests.eagle_core.training.test_trainer import (
    CONFIG,
    InterruptedHereError,
    assert_close,
    assert_equal_bits,
    interrupt_at,
    moments,
    run,
)
from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS

SOURCE = long_source([9, 70, 3, 30, 31, 12, 150, 5, 8, 44, 29, 6])
LONG = CONFIG.model_copy(update={"batch_tokens": 32, "max_steps": None, "epochs": 2})


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each batch that training and measuring computed on."""
    found: list[int] = []
    forward: Callable[..., Any] = OptimizerStep.forward

    def recorded(self: Any, batch: PackedBatch, *given: Any) -> Any:
        found.append(batch.num_tokens)
        return forward(self, batch, *given)

    monkeypatch.setattr(OptimizerStep, "forward", recorded)
    return found


def num_steps(config: TrainingConfig) -> int:
    """Return the length of a run on `SOURCE`."""
    windows = Windows.of(config, random_draft()[0].config)
    return RunSteps(
        config=config, lengths=SOURCE.lengths, groups=SOURCE.groups, windows=windows
    ).last()


def test_a_run_on_long_samples_has_no_large_batch_and_learns(
    tmp_path: Path, sizes: list[int]
) -> None:
    _, result = run(tmp_path, LONG, source=SOURCE)
    assert result.num_steps == num_steps(LONG) > 2 * sum(SOURCE.lengths) / 32
    assert 25 < max(sizes) <= 32
    assert math.isfinite(result.figures.loss)
    assert result.figures.loss < result.figures.first_loss
    sizes.clear()
    whole = LONG.model_copy(update={"window_tokens": WHOLE_SAMPLES})
    _, undivided = run(tmp_path / "whole", whole, source=SOURCE)
    assert max(sizes) == 150
    assert undivided.num_steps == num_steps(whole) < result.num_steps


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("variant", [{}, {"sliding_window": 4, "num_hidden_layers": 2}], ids=str)
def test_a_run_that_stops_in_the_middle_of_a_sample_resumes_exactly(
    tmp_path: Path, limit: int | None, variant: dict[str, Any]
) -> None:
    config = LONG.model_copy(update={"checkpoint_every": 1, "max_positions_per_sample": limit})
    expected, result = run(tmp_path / "whole", config, source=SOURCE, variant=variant)
    cut: list[int] = []
    for step in range(1, result.num_steps, 4):
        with pytest.raises(InterruptedHereError):
            run(
                tmp_path / "broken",
                config,
                source=SOURCE,
                variant=variant,
                on_progress=interrupt_at(step + 1),
            )
        folder = checkpoint.newest(tmp_path / "broken")
        assert folder is not None
        cut.append(checkpoint.read(folder).loader.next_token)
    assert any(cut), "some attempt ended in the middle of a sample"
    found, resumed = run(tmp_path / "broken", config, source=SOURCE, variant=variant)
    assert_equal_bits(found, expected)
    assert resumed.figures == result.figures


def test_a_draft_with_a_sliding_window_makes_the_step_of_whole_samples(tmp_path: Path) -> None:
    """All pieces in one step: the same sums, the same divisors."""
    changes = {"max_steps": 1, "max_grad_norm": 1e9, "batches_per_step": 100}
    variant = {"sliding_window": 5, "num_hidden_layers": 2}
    pieces = CONFIG.model_copy(update={**changes, "batch_tokens": 32})
    whole = pieces.model_copy(update={"window_tokens": WHOLE_SAMPLES})
    for name, config in (("pieces", pieces), ("whole", whole)):
        run(tmp_path / name, config, source=SOURCE, variant=variant)
    assert_close(moments(tmp_path / "pieces"), moments(tmp_path / "whole"))


def test_other_windows_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, LONG, source=SOURCE)
    other = LONG.model_copy(update={"window_tokens": 40, "epochs": 3, "extend": "keep"})
    with pytest.raises(MismatchError, match=r"training\.window_tokens: saved 32, now 40"):
        run(tmp_path, other, source=SOURCE)
    named = LONG.model_copy(update={"window_tokens": 32})
    run(tmp_path, named, source=SOURCE)


def test_a_checkpoint_of_an_earlier_version_goes_on_with_whole_samples(
    tmp_path: Path, sizes: list[int]
) -> None:
    """It names no window, and no token in its sample."""
    whole = LONG.model_copy(update={"window_tokens": WHOLE_SAMPLES})
    expected, _ = run(tmp_path / "whole", whole, source=SOURCE)
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "old", whole, source=SOURCE, on_progress=interrupt_at(5))
    folder = checkpoint.newest(tmp_path / "old")
    assert folder is not None
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    del document["identity"]["training"]["window_tokens"], document["loader"]["next_token"]
    (folder / STATE).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(MismatchError, match=rf"window_tokens: saved {WHOLE_SAMPLES}, now 32"):
        run(tmp_path / "old", LONG, source=SOURCE)
    sizes.clear()
    found, _ = run(tmp_path / "old", whole, source=SOURCE)
    assert_equal_bits(found, expected)
    assert max(sizes) == 150


def test_context_is_no_trained_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meters: list[ThroughputMeter] = []

    class Meter(ThroughputMeter):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            meters.append(self)

    monkeypatch.setattr(trainer, "ThroughputMeter", Meter)
    run(tmp_path, LONG.model_copy(update={"epochs": 1}), source=SOURCE)
    (meter,) = meters
    assert meter._num_tokens == sum(SOURCE.lengths)
    assert meter._num_supervised == sum(SOURCE.lengths) - 2 * len(SOURCE.lengths)


_RANKS = """
import json, sys
from pathlib import Path
from eagle_core.training.distributed import join_processes
from tests.eagle_core.training import test_piece_training as test
with join_processes():
    for config in json.loads(sys.argv[2]):
        config = test.TrainingConfig.model_validate(config)
        test.run(Path(sys.argv[1]), config, source=test.SOURCE)
"""


@pytest.mark.slow
def test_two_ranks_share_the_pieces_of_a_sample(tmp_path: Path) -> None:
    """The same steps as one process, also after an interruption in the middle of a sample."""
    changes = {"max_steps": 20, "checkpoint_every": 100, "schedule": "constant"}
    config = LONG.model_copy(update={**changes, "max_grad_norm": 1e9})
    in_turns = config.model_copy(update={"batches_per_step": 2})
    one, result = run(tmp_path / "one", in_turns, source=SOURCE)
    attempts = [config.model_copy(update={"max_steps": steps}) for steps in (7, 20)]
    script = tmp_path / "ranks.py"
    script.write_text(_RANKS)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), str(tmp_path / "two")),
            json.dumps([attempt.model_dump(mode="json") for attempt in attempts]),
        ],
        check=True,
        timeout=LIMIT_SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    folders = [checkpoint.folder_of(tmp_path / "two", step) for step in (7, 20)]
    assert checkpoint.read(folders[0]).loader.next_token > 0
    draft, _ = random_draft()
    checkpoint.load_weights(draft, folders[1])
    assert_close(draft.state_dict(), one)
    assert_close(moments(tmp_path / "two"), moments(tmp_path / "one"))
    found = checkpoint.read(folders[1])
    assert found.figures["loss"] == pytest.approx(result.figures.loss, rel=1e-4)
