"""Let a given draft read other aux layers than those it was trained on: solve its fusing matrix.

Its decoder layer knows the fused states of the layers it was trained on. A ridge regression finds
the matrix that makes the nearest states of the layers that there are now. All else is taken over.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from eagle_core.bfloat16 import widened
from eagle_core.closed_form.moments import Moments
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError
from eagle_core.training.distributed import Processes
from eagle_core.training.packing import PackedBatch

KnownAux = Callable[[Iterable[PackedBatch]], Iterator[tuple[PackedBatch, Tensor]]]
"""Yields batches of N tokens with [N, 3Ht] the aux states that a draft was trained on."""


@torch.no_grad()
def refit_fusing_matrix(
    draft: DraftModel, batches: Iterable[PackedBatch], known: KnownAux, processes: Processes
) -> float:
    """Solve `fc` for the aux states of `batches`, in place.

    Args:
        draft: the given one, whose channels are not scaled; the same on all processes.
        batches: this process's share, with the aux states to read from now on; read once.
        known: the aux states that it was trained on.
        processes: all of which call this; all solve the same sums.

    Returns:
        The misfit: the mean square of the difference of the fused states, as a share of theirs.

    Raises:
        ConfigError: the states are not finite, or there are none.

    """
    device = draft.fc.weight.device
    moments = Moments(draft.fc.in_features, draft.fc.out_features, device)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for batch, states in known(batches):
        fused = draft.fuse(widened(states.to(device)))
        moments.add(draft.fusing_inputs(widened(batch.aux_hidden_states.to(device))), fused)
        squares += fused.double().square().sum()
    moments.sum_over(processes)
    squares = processes.total(squares)
    try:
        solution = moments.solve()
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConfigError(
            f"the draft's fusing matrix cannot be solved for these aux layers: {error}; leave out "
            "training.refit, and train from training.start=closed_form"
        ) from error
    draft.fc.weight.copy_(solution.T)
    explained = 2 * (solution * moments.cross).sum()
    explained -= (solution * (moments.gram @ solution)).sum()
    return float(1 - explained / squares)
