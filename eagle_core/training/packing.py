"""Samples packed end to end into one batch: no padding, and no attention across samples.

Shapes: N tokens of the batch, A aux layers (3), Ht target hidden size, S sequences.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.samples import HiddenStateSample
from eagle_core.training.positions import own_mask
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
    position_weights: Tensor | None = None
    """[N] float32 factor of each position in the loss, 0 where none is computed; None: all 1"""
    own: tuple[range, ...] | None = None
    """[S] the positions of the batch whose loss counts here; None: all. The others are context."""
    plan: StepPlan | None = None
    """Where a step computes; None if the step is to work that out"""

    @property
    def num_tokens(self) -> int:
        """Return N."""
        return self.starts[-1]

    @property
    def num_own_tokens(self) -> int:
        """Return how many of the tokens are no context."""
        return self.num_tokens if self.own is None else sum(map(len, self.own))

    def is_own(self) -> Tensor:
        """Return [N] bool, on the CPU: whether a token is no context."""
        return own_mask(self.own, self.num_tokens)

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
    samples: Sequence[HiddenStateSample],
    *,
    own: Sequence[range] | None = None,
    position_weights: NDArray[np.float32] | None = None,
    pin_memory: bool = False,
) -> PackedBatch:
    """Return `samples` as one batch; states stay in bfloat16, as stored, to move fewer bytes.

    Args:
        samples: to concatenate.
        own: the positions of each whose loss counts; by default all.
        position_weights: [N] factors of their N positions in the loss; by default 1.
        pin_memory: whether a CUDA device is to copy the batch while it computes.

    """
    starts = (0, *np.cumsum([len(sample) for sample in samples]).tolist())
    weights = None if position_weights is None else torch.from_numpy(position_weights)

    def joined(name: str, dtype: torch.dtype) -> Tensor:
        parts = [getattr(sample, name) for sample in samples]
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        whole = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
        np.concatenate(parts, out=whole.numpy(), casting="unsafe")
        return whole

    return PackedBatch(
        sample_ids=tuple(sample.sample_id for sample in samples),
        starts=starts,
        input_ids=joined("input_ids", torch.int64),
        loss_mask=joined("loss_mask", torch.bool),
        aux_hidden_states=joined("aux_hidden_states", torch.uint16).view(torch.bfloat16).flatten(1),
        last_hidden_state=joined("last_hidden_state", torch.uint16).view(torch.bfloat16),
        target_argmax=joined("target_argmax", torch.int64),
        target_logsumexp=joined("target_logsumexp", torch.float32),
        position_weights=weights.pin_memory() if weights is not None and pin_memory else weights,
        own=None if own is None else _in_batch(own, starts),
    )


def _in_batch(own: Sequence[range], starts: Sequence[int]) -> tuple[range, ...] | None:
    """Return the own positions of each sample in the batch; None if there are no others."""
    if list(map(len, own)) == np.diff(starts).tolist():
        return None
    return tuple(
        range(start + one.start, start + one.stop)
        for start, one in zip(starts[:-1], own, strict=True)
    )
