"""Samples packed end to end into one batch: no padding, and no attention across samples.

Shapes: N tokens of the batch, A aux layers (3), Ht target hidden size, S sequences.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_core.samples import HiddenStateSample
from eagle_core.training.step_plan import StepPlan


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
    plan: StepPlan | None = None
    """Where a step computes; None if the step is to work that out"""

    @property
    def num_tokens(self) -> int:
        """Return N."""
        return self.starts[-1]

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors by field, without those of the plan."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "PackedBatch":
        """Return the batch with its tensors on `device`.

        With `non_blocking`, the copy of a batch in pinned memory is only begun.
        """
        moved = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name, tensor in self.tensors().items()
        }
        plan = None if self.plan is None else self.plan.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, plan=plan, **moved)  # type: ignore[arg-type]  # tensors


def pack(
    samples: Sequence[HiddenStateSample], draws: Tensor | None = None, *, pin_memory: bool = False
) -> PackedBatch:
    """Return `samples` as one batch; states stay in bfloat16, as stored, to move fewer bytes.

    Args:
        samples: to concatenate.
        draws: [N] of their N tokens, if only some positions are to be taken.
        pin_memory: whether a CUDA device is to copy the batch while it computes.

    """

    def joined(name: str, dtype: torch.dtype) -> Tensor:
        parts = [getattr(sample, name) for sample in samples]
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        whole = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
        np.concatenate(parts, out=whole.numpy(), casting="unsafe")
        return whole

    return PackedBatch(
        sample_ids=tuple(sample.sample_id for sample in samples),
        starts=(0, *np.cumsum([len(sample) for sample in samples]).tolist()),
        input_ids=joined("input_ids", torch.int64),
        loss_mask=joined("loss_mask", torch.bool),
        aux_hidden_states=joined("aux_hidden_states", torch.uint16).view(torch.bfloat16).flatten(1),
        last_hidden_state=joined("last_hidden_state", torch.uint16).view(torch.bfloat16),
        target_argmax=joined("target_argmax", torch.int64),
        target_logsumexp=joined("target_logsumexp", torch.float32),
        draws=draws.pin_memory() if draws is not None and pin_memory else draws,
    )
