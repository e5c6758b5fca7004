"""Solve the feed-forward block's last matrix on the states that the network itself computes.

Its units, linear and random ones, are fixed; what they should add is the target's final state less
the residual stream. The rows are those of all training-time-test steps. Since later steps read what
earlier ones predict, the solution is repeated.

Shapes: R rows, H draft hidden, I intermediate size.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from eagle_core.closed_form.layer import Channels
from eagle_core.closed_form.moments import Moments
from eagle_core.closed_form.predictions import Predictions
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TttConfig
from eagle_core.training.distributed import Processes
from eagle_core.training.packing import PackedBatch
from eagle_core.training.ttt import batch_plan, chain_states

_ROUNDS = 1
_UNIT_SIZE = 0.1
"""Root mean square of every unit's output; see `layer._UNIT_INPUT`."""

_SMALLEST = 0.01
"""Units smaller than this share of the largest one have no weight: of those that are closed, or
that read a direction in which nothing varies, bfloat16 would leave only rounding."""

Rows = Callable[[PackedBatch], Predictions]


@torch.no_grad()
def solve_feed_forward(
    draft: DraftModel,
    batches: Iterable[PackedBatch],
    rows_of: Rows,
    options: TttConfig,
    processes: Processes,
    *,
    channels: Channels,
) -> None:
    """Solve `down_proj` on `batches`, which are read `_ROUNDS` times.

    Args:
        draft: holds a linear recurrence.
        batches: of this process, on the draft's device.
        rows_of: returns what each step of a batch should predict.
        options: the training-time-test settings.
        processes: all of which call this.
        channels: nothing is added to the constant; the flag is cleared.

    """
    mlp, config = draft.midlayer.mlp, draft.config
    for _ in range(_ROUNDS):
        sums = Moments(config.intermediate_size, config.hidden_size, draft.fc.weight.device)
        for batch in batches:
            _add_rows(sums, draft, batch, rows_of(batch), options, channels)
        sums.sum_over(processes)
        sizes = (sums.gram.diagonal() / sums.num_rows).sqrt()
        is_empty = sizes < _SMALLEST * sizes.max()
        sums.drop(is_empty)
        factors = torch.where(is_empty, 1.0, sizes / _UNIT_SIZE).unsqueeze(1)
        mlp.up_proj.weight.div_(factors)
        mlp.down_proj.weight.copy_((sums.solve() * factors).T)


def _add_rows(
    sums: Moments,
    draft: DraftModel,
    batch: PackedBatch,
    rows: Predictions,
    options: TttConfig,
    channels: Channels,
) -> None:
    attended: list[Tensor] = []
    plan = batch_plan(draft.t2d, batch, options)
    states = chain_states(draft, batch, plan, options, on_attended=attended.append)
    for step, _ in enumerate(states):
        counted = rows.is_counted[step]
        residual = attended[step][counted]
        missing = rows.finals(step)[counted] - residual
        missing[:, channels.constant] = 0
        missing[:, channels.flag] = -residual[:, channels.flag]
        sums.add(_units(draft, residual), missing)


def _units(draft: DraftModel, residual: Tensor) -> Tensor:
    """Return the outputs [R, I] of the units for the residual stream [R, H]."""
    mlp, normed = draft.midlayer.mlp, draft.midlayer.post_attention_layernorm(residual)
    units: Tensor = nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    return units
