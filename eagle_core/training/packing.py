"""Samples packed end to end into one batch: no padding, and no attention across samples.

Shapes: N tokens of the batch, A aux layers (3), Ht target hidden size, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.samples import HiddenStateSample


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """S concatenated samples."""

    sample_ids: tuple[str, ...]
    starts: tuple[int, ...]
    """[S + 1] first token of each sequence, then N."""
    input_ids: Tensor
    """[N] int64"""
    loss_mask: Tensor
    """[N] bool"""
    aux_hidden_states: Tensor
    """[N, A * Ht], of any dtype: the step widens them"""
    last_hidden_state: Tensor
    """[N, Ht] after the final norm, of any dtype"""
    target_argmax: Tensor
    """[N] int64, over the target vocabulary"""
    target_logsumexp: Tensor
    """[N] float32, over the target vocabulary"""
    draws: Tensor | None = None
    """[N] int64, `position_draws`; None if the loss is computed at all positions"""

    @property
    def num_tokens(self) -> int:
        """Return N."""
        return self.starts[-1]

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch with its tensors on `device`."""
        return PackedBatch(
            sample_ids=self.sample_ids,
            starts=self.starts,
            input_ids=self.input_ids.to(device),
            loss_mask=self.loss_mask.to(device),
            aux_hidden_states=self.aux_hidden_states.to(device),
            last_hidden_state=self.last_hidden_state.to(device),
            target_argmax=self.target_argmax.to(device),
            target_logsumexp=self.target_logsumexp.to(device),
            draws=None if self.draws is None else self.draws.to(device),
        )


def pack(samples: Sequence[HiddenStateSample], draws: Tensor | None = None) -> PackedBatch:
    """Return `samples` as one batch; states stay in bfloat16, as stored, to move fewer bytes.

    Args:
        samples: to concatenate.
        draws: [N] of their N tokens, if only some positions are to be taken.

    """
    aux = np.concatenate([sample.aux_hidden_states for sample in samples])
    last = np.concatenate([sample.last_hidden_state for sample in samples])
    argmax = np.concatenate([sample.target_argmax for sample in samples])
    logsumexp = np.concatenate([sample.target_logsumexp for sample in samples])
    ids = np.concatenate([sample.input_ids for sample in samples])
    mask = np.concatenate([sample.loss_mask for sample in samples])
    return PackedBatch(
        sample_ids=tuple(sample.sample_id for sample in samples),
        starts=(0, *np.cumsum([len(sample) for sample in samples]).tolist()),
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        loss_mask=torch.from_numpy(mask.astype(np.bool_)),
        aux_hidden_states=from_bfloat16_bits(aux, dtype=torch.bfloat16).flatten(1),
        last_hidden_state=from_bfloat16_bits(last, dtype=torch.bfloat16),
        target_argmax=torch.from_numpy(argmax.astype(np.int64)),
        target_logsumexp=torch.from_numpy(logsumexp.astype(np.float32)),
        draws=draws,
    )
