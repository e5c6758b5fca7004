"""Sizes of a target's states, from the states alone: of aux channels, and of the final norm's gain.

Shapes: N tokens, H target hidden size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_core.bfloat16 import widened
from eagle_core.closed_form.moments import RIDGE, Moments
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TttConfig
from eagle_core.training.distributed import Processes
from eagle_core.training.packing import PackedBatch
from eagle_core.training.ttt import batch_positions

_MOST_MISFIT = 0.2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StateSizes:
    """What a start needs to know of a target's states."""

    aux_scale: Tensor
    """[3H] powers of two: the root mean square of each aux channel, rounded."""
    final_gain: Tensor
    """[H] the gain of the target's final norm, without signs."""


@torch.no_grad()
def measure_state_sizes(
    draft: DraftModel, batches: Iterable[PackedBatch], options: TttConfig, processes: Processes
) -> StateSizes:
    """Measure the states of `batches`, for a draft whose channels are not scaled yet.

    Of the final states only those count that a loss reads: a store omits others.
    """
    device = draft.fc.weight.device
    squares = torch.zeros(draft.fc.in_features, dtype=torch.float64, device=device)
    num_tokens = torch.zeros((), dtype=torch.float64, device=device)
    norms = Moments(draft.config.target_hidden_size, 1, device)
    for batch in batches:
        aux = draft.fusing_inputs(widened(batch.aux_hidden_states.to(device))).double()
        counted = batch_positions(draft.t2d, batch.to(device), options).counted[0]
        read = batch.last_hidden_state.to(device)[counted.nonzero().squeeze(1) + 1]
        add_norms(norms, read)
        if batch.own is not None:
            aux = aux[batch.is_own().to(device)]
        squares += aux.square().sum(dim=0)
        num_tokens += len(aux)
    norms.sum_over(processes)
    mean_squares = processes.total(squares) / processes.total(num_tokens)
    return StateSizes(
        aux_scale=_power_of_two(mean_squares.sqrt()).float(),
        final_gain=final_gain(norms).float(),
    )


def _power_of_two(sizes: Tensor) -> Tensor:
    """Return the nearest powers of two; 1 for a channel that is always zero, or not finite."""
    is_usable = (sizes > 0) & torch.isfinite(sizes)
    exponents = torch.where(is_usable, sizes, 1.0).log2().round()
    return torch.exp2(exponents)


def add_norms(norms: Moments, final: Tensor) -> None:
    """Add final states [N, H] to the sums of `final_gain`: of H features and one target."""
    norms.add(widened(final).square(), torch.ones_like(final[:, :1]))


def final_gain(norms: Moments) -> Tensor:
    """Return [H] float64 the gain of the target's final norm, from the sums of `add_norms`.

    The states after the final norm are `u * gain`, where u has the mean square 1. So the mean of
    (state / gain)^2 over channels is 1 for every token: a regression of 1 on the squares gives
    1 / gain^2, whatever the architecture calls its norm. Where that fits badly, for a norm that
    subtracts a mean, say, each channel's root mean square takes its place.
    """
    mean_squares = norms.cross.squeeze(1) / norms.num_rows
    if not bool(norms.num_rows.any() and torch.isfinite(norms.gram).all()):
        return torch.ones_like(mean_squares)  # nothing can be solved from such states
    smallest = mean_squares[mean_squares > 0].min()
    by_channel = mean_squares.clamp(min=smallest)
    width = len(by_channel)
    inverse_squares = norms.solve(ridge=RIDGE / 100).squeeze(1) * width
    fitted = 1 / inverse_squares.clamp(min=1e-12)
    # Mean of squares that a gain of this size leaves; 1 if the fit is right.
    left = (mean_squares / fitted).mean()
    is_sound = bool((inverse_squares > 0).all()) and abs(float(left) - 1) < _MOST_MISFIT
    return (fitted if is_sound else by_channel).sqrt()
