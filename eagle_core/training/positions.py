"""Which positions take part in which training-time-test step, and the weight of each loss.

An index takes part in step i only if the loss of step i or of a later one counts there. The others
contribute only step-0 keys and values, as do those that are not drawn where only some are taken.

Shapes: N packed tokens, L training-time-test steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    draws: Tensor | None = None,
    limit: int | None = None,
) -> TttPositions:
    """Return the positions that take part in each step.

    Args:
        loss_mask: [N] bool, token is the assistant's.
        in_vocabulary: [N] bool, the target's argmax after this token is in the draft vocabulary.
        starts: [S + 1] borders of the sequences.
        ttt_length: L.
        positions: "eagle3" requires loss_mask[t + i], "predicted" loss_mask[t + 2 + i].
        reduction: divisor of the sum of a step's losses.
        draws: [N] int64, a random permutation of each sequence; None takes all positions.
        limit: most supervised indices to take of a sequence, those with the smallest draws.

    """
    ends = torch.zeros_like(loss_mask)
    sequence = torch.zeros_like(loss_mask, dtype=torch.int64)
    for number, (start, end) in enumerate(pairwise(starts)):
        ends[end - 1] = True
        sequence[start:end] = number
    mask = loss_mask & ~ends if positions == "eagle3" else loss_mask
    ahead = 0 if positions == "eagle3" else 2
    supervised = torch.stack(
        [
            _shifted(mask, sequence, ahead + step) & _exists(sequence, step + 1)
            for step in range(ttt_length)
        ]
    )
    known = torch.stack([_shifted(in_vocabulary, sequence, step + 1) for step in range(ttt_length)])
    counted = supervised & known
    shares, totals = _shares(counted, sequence, len(starts) - 1, reduction)
    if draws is not None and limit is not None:
        is_drawn, factor = _drawn(supervised.any(dim=0), sequence, starts, draws, limit)
        supervised, counted, shares = supervised & is_drawn, counted & is_drawn, shares * factor
    takes_part = counted.flip(0).cumsum(0).flip(0) > 0
    return TttPositions(
        supervised=supervised,
        counted=counted,
        indices=tuple(row.nonzero().squeeze(1) for row in takes_part),
        shares=shares,
        totals=totals,
    )


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
    counted: Tensor, sequence: Tensor, num_sequences: int, reduction: LossReduction
) -> tuple[Tensor, Tensor]:
    """Return shares [L, N] and their divisor in each step [L]."""
    counts = counted.float()
    if reduction == "positions":
        return counts, torch.full_like(counts[:, 0], counted.shape[1])
    if reduction == "tokens":
        return counts, counts.sum(dim=1)
    of_sequence = counts.new_zeros(len(counts), num_sequences)
    of_sequence.index_add_(1, sequence, counts)
    contributing = (of_sequence > 0).sum(dim=1).float()
    return counts / of_sequence[:, sequence].clamp(min=1), contributing


def _drawn(
    pool: Tensor, sequence: Tensor, starts: Sequence[int], draws: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    """Return [N] whether an index of the pool [N] is taken, and [N] the factor of its weight.

    Of n indices in a sequence, k are taken, each as likely as any other. The loss at one depends on
    no other that is taken, so with factor n / k its expected gradient is that of all: the divisors
    count all of them, too.
    """
    size, device = len(pool), pool.device
    order = torch.argsort(sequence * (2 * size) + (~pool) * size + draws)
    first = torch.tensor(starts, device=device)[sequence[order]]
    place = torch.empty_like(order)
    place[order] = torch.arange(size, device=device) - first
    is_drawn = pool & (place < limit)
    in_pool = torch.bincount(sequence[pool], minlength=len(starts) - 1)
    factor = in_pool / in_pool.clamp(min=1, max=limit)
    return is_drawn, factor[sequence] * is_drawn
