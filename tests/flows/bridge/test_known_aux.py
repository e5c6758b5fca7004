"""Aux states of other layers, for batches at hand: also of a target that runs layer by layer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eagle_core.samples import HiddenStateSample
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.streamed import StreamedTarget
from eagle_core.target.model import TargetModel
from eagle_core.training.packing import PackedBatch, pack
from flows.bridge.known_aux import known_aux
from tests.eagle_core.target.layerwise.test_streamed import samples, write

LAYERS = (0, 3, 5)


@pytest.fixture
def config(tmp_path: Path) -> TargetConfig:
    return write("llama", tmp_path)


def _batches(states: list[HiddenStateSample]) -> list[PackedBatch]:
    return [pack(states[first : first + 2]) for first in range(0, len(states), 2)]


@pytest.mark.parametrize("pass_tokens", [1, 120, 1000])
def test_each_batch_has_its_own_states(config: TargetConfig, pass_tokens: int) -> None:
    whole = TargetModel.load(config)
    given = samples((30, 20, 40, 25, 5))
    by_id = {one.sample_id: one for one in capture_states(whole, given)}
    batches = _batches([by_id[sample.sample_id] for sample in given])
    passed: list[int] = []
    streamed = StreamedTarget.load(config, group_tokens=pass_tokens, on_tokens=passed.append)
    found = list(known_aux(streamed, LAYERS)(iter(batches)))
    expected = list(known_aux(whole, LAYERS)(iter(batches)))
    assert [batch for batch, _ in found] == batches
    for (batch, states), (_, known) in zip(found, expected, strict=True):
        assert states.shape == (batch.num_tokens, 3 * 32)
        assert torch.equal(states, known)
    # The last batch is one short sample; the others are padded, so that 120 hold one or two.
    assert streamed.times.num_passes == {1: 3, 120: 2, 1000: 1}[pass_tokens]
    assert np.sum(passed) >= 120
