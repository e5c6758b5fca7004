"""The aux states that a given draft was trained on, for samples of which a store has others."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.closed_form.refit import KnownAux
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import CapturingTarget, capture_groups
from eagle_core.training.packing import PackedBatch

_MOST_TOKENS = 65_536
"""That are captured together: the batches wait in memory, with the states at hand."""


def known_aux(target: CapturingTarget, layers: Sequence[int]) -> KnownAux:
    """Return what captures the aux states of `layers` for the samples of batches.

    A streamed target takes many batches through one layer.
    """

    def capture(batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, Tensor]]:
        for together in _runs(batches, min(target.pass_tokens, _MOST_TOKENS)):
            groups = capture_groups(target, list(map(_samples_of, together)), layers=layers)
            for batch, states in zip(together, groups, strict=True):
                yield batch, _in_order(states, batch)

    return capture


def _runs(batches: Iterable[PackedBatch], most: int) -> Iterator[list[PackedBatch]]:
    """Yield batches in lists of at most `most` tokens, or of one batch."""
    run: list[PackedBatch] = []
    for batch in batches:
        if run and sum(one.num_tokens for one in [*run, batch]) > most:
            yield run
            run = []
        run.append(batch)
    if run:
        yield run


def _samples_of(batch: PackedBatch) -> list[TokenizedSample]:
    ids = batch.input_ids.cpu().numpy().astype(np.int32)
    mask = batch.loss_mask.cpu().numpy()
    return [
        TokenizedSample(sample_id=name, input_ids=ids[first:end], loss_mask=mask[first:end])
        for name, (first, end) in zip(batch.sample_ids, pairwise(batch.starts), strict=True)
    ]


def _in_order(states: Iterator[HiddenStateSample], batch: PackedBatch) -> Tensor:
    found = {
        state.sample_id: from_bfloat16_bits(state.aux_hidden_states, dtype=torch.bfloat16)
        for state in states
    }
    return torch.cat([found[name] for name in batch.sample_ids]).flatten(1)
