"""The aux states that a given draft was trained on, for samples of which a store has others."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.closed_form.refit import KnownAux
from eagle_core.samples import TokenizedSample
from eagle_core.target.capture import CapturingTarget, capture_states
from eagle_core.training.packing import PackedBatch


def known_aux(target: CapturingTarget, layers: Sequence[int]) -> KnownAux:
    """Return what captures the aux states of `layers` for the samples of a batch."""

    def capture(batch: PackedBatch) -> Tensor:
        ids = batch.input_ids.cpu().numpy().astype(np.int32)
        mask = batch.loss_mask.cpu().numpy()
        samples = [
            TokenizedSample(sample_id=name, input_ids=ids[first:end], loss_mask=mask[first:end])
            for name, (first, end) in zip(batch.sample_ids, pairwise(batch.starts), strict=True)
        ]
        found = {
            state.sample_id: from_bfloat16_bits(state.aux_hidden_states, dtype=torch.bfloat16)
            for state in capture_states(target, samples, layers=layers)
        }
        return torch.cat([found[name] for name in batch.sample_ids]).flatten(1)

    return capture
