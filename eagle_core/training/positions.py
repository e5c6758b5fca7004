"""Which positions take part in which training-time-test step, and the weight of each loss.

An index takes part in step i only if the loss of step i or of a later one counts there. The others
contribute only step-0 keys and values, as do those that are not drawn where only some are taken,
and the context of a piece of a sample.

Shapes: N packed tokens, L training-time-test steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_core.training.config import LossPositions, LossReduction


@dataclass(frozen=True, kw_only=True, slots=True)
class TttPositions:
    """Where each step computes and where its loss counts."""

    supervised: Tensor
    """[L, N] bool: the loss mask is set and the target's next distribution exists."""
    counted: Tensor
    """[L, N] bool: supervised, and the target's argmax is in the draft vocabulary."""
    indices: tuple[Tensor, ...]
    """[L] of [A_i]: indices that take part in step i, ascending; each contains the next."""
    shares: Tensor
    """[L, N] float32: weight of each position; the step's loss is the weighted mean."""
    totals: Tensor
    """[L] float32: divisor of the weighted sum in each step."""

    def weights(self, totals: Tensor | None = None) -> Tensor:
        """Return [L, N] the factor of each position in its step's loss.

        Args:
            totals: [L] divisors over all batches of an optimizer step; by default this batch's.

        """
        divisors = self.totals if totals is None else totals
        return self.shares / divisors.clamp(min=1).unsqueeze(1)


def ttt_positions(
    *,
    loss_mask: Tensor,
    in_vocabulary: Tensor,
    starts: Sequence[int],
    ttt_length: int,
    positions: LossPositions,
    reduction: LossReduction,
    own: Sequence[range] | None = None,
    position_weights: Tensor | None = None,
) -> TttPositions:
    """Return the positions that take part in each step.

    Args:
        loss_mask: [N] bool, token is the assistant's.
        in_vocabulary: [N] bool, the target's argmax after this token is in the draft vocabulary.
        starts: [S + 1] borders of the sequences.
        ttt_length: L.
        positions: "eagle3" requires loss_mask[t + i], "predicted" loss_mask[t + 2 + i].
        reduction: divisor of the sum of a step's losses.
        own: [S] the indices of each sequence whose loss counts; None: all.
        position_weights: [N] float32 factor of each index in the loss; where it is 0, none is
            computed. The divisors count all. None: 1 everywhere.

    """
    sequence = _sequence(starts)
    is_own = own_mask(own, len(loss_mask))
    supervised = is_own & supervised_steps(
        loss_mask, starts, ttt_length=ttt_length, positions=positions
    )
    known = torch.stack([_shifted(in_vocabulary, sequence, step + 1) for step in range(ttt_length)])
    counted = supervised & known
    num_own = len(loss_mask) if own is None else sum(map(len, own))
    shares, totals = _shares(counted, sequence, len(starts) - 1, num_own, reduction)
    if position_weights is not None:
        is_drawn = position_weights > 0
        supervised, counted = supervised & is_drawn, counted & is_drawn
        shares = shares * position_weights
    takes_part = counted.flip(0).cumsum(0).flip(0) > 0
    return TttPositions(
        supervised=supervised,
        counted=counted,
        indices=tuple(row.nonzero().squeeze(1) for row in takes_part),
        shares=shares,
        totals=totals,
    )


def own_mask(own: Sequence[range] | None, size: int) -> Tensor:
    """Return [N] bool: whether an index is among `own`; True everywhere for None."""
    if own is None:
        return torch.ones(size, dtype=torch.bool)
    mask = torch.zeros(size, dtype=torch.bool)
    for one in own:
        mask[one.start : one.stop] = True
    return mask


def supervised_steps(
    loss_mask: Tensor, starts: Sequence[int], *, ttt_length: int, positions: LossPositions
) -> Tensor:
    """Return [L, N] bool: the loss mask is set and the target's next distribution exists.

    For the arguments see `ttt_positions`.
    """
    sequence = _sequence(starts)
    mask, ahead = loss_mask, 2
    if positions == "eagle3":
        mask, ahead = loss_mask.clone(), 0
        mask[torch.tensor(starts[1:]) - 1] = False
    return torch.stack(
        [
            _shifted(mask, sequence, ahead + step) & _exists(sequence, step + 1)
            for step in range(ttt_length)
        ]
    )


def _sequence(starts: Sequence[int]) -> Tensor:
    """Return [N] int64 the number of the sequence of each token."""
    sizes = torch.tensor(starts).diff()
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def _exists(sequence: Tensor, shift: int) -> Tensor:
    """Return [N] whether the token `shift` positions later is in the same sequence."""
    exists = torch.zeros_like(sequence, dtype=torch.bool)
    if shift < len(sequence):
        exists[: len(sequence) - shift] = sequence[: len(sequence) - shift] == sequence[shift:]
    return exists


def _shifted(flags: Tensor, sequence: Tensor, shift: int) -> Tensor:
    """Return [N] the flag `shift` positions later in the same sequence, False beyond its end."""
    moved = torch.zeros_like(flags)
    if shift < len(flags):
        moved[: len(flags) - shift] = flags[shift:]
    return moved & _exists(sequence, shift) if shift else flags


def _shares(
    counted: Tensor, sequence: Tensor, num_sequences: int, num_own: int, reduction: LossReduction
) -> tuple[Tensor, Tensor]:
    """Return shares [L, N] and their divisor in each step [L]."""
    counts = counted.float()
    if reduction == "positions":
        return counts, torch.full_like(counts[:, 0], num_own)
    if reduction == "tokens":
        return counts, counts.sum(dim=1)
    of_sequence = counts.new_zeros(len(counts), num_sequences)
    of_sequence.index_add_(1, sequence, counts)
    contributing = (of_sequence > 0).sum(dim=1).float()
    return counts / of_sequence[:, sequence].clamp(min=1), contributing
