"""A draft as a linear recurrence, solved for all training-time-test steps.

With a the aux states, e_k the embedding of the token that step k adds, and p_k its prediction of
the target's final state:

    p_0 = F a + E e_0
    p_k = M p_(k-1) + N e_k

F fuses, M carries, E and N embed. The regression of later steps needs the predictions of earlier
ones: those of the last solution.

Shapes: H draft hidden, Ht target hidden, A_k indices of step k.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagle_core.closed_form.moments import Moments
from eagle_core.closed_form.predictions import Predictions
from eagle_core.draft.model import DraftModel
from eagle_core.training.distributed import Processes

_ROUNDS = 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recurrence:
    """The solved maps, float64, and the second moments of what they read."""

    fusing: Tensor
    """F [H, 3Ht]"""
    first_embedding: Tensor
    """E [H, H]"""
    carry: Tensor
    """M [H, H]"""
    later_embedding: Tensor
    """N [H, H]"""
    constant: Tensor
    """[3Ht] the combination of aux states that is nearest to 1 at every position"""
    embedding_moments: Tensor
    """[H, H] of the embeddings, less what the aux states tell of them"""
    num_embeddings: int
    """Rows of these moments."""
    state_moments: Tensor
    """[H, H] mean of z z^T, for the states z that the layer reads: F a, and p of later steps"""

    def predictions(self, rows: Predictions) -> Iterator[Tensor]:
        """Yield per step the predictions [A_k, H] of a batch."""
        yield (state := self.first(rows, rows.indices[0]))
        carry, embedding = self.carry.float().T, self.later_embedding.float().T
        for step in range(1, len(rows.indices)):
            carried = state[rows.kept(step)] @ carry
            yield (state := carried + rows.embeddings(step) @ embedding)

    def first(self, rows: Predictions, indices: Tensor) -> Tensor:
        """Return the predictions of step 0 [A, H] at `indices`."""
        fused = rows.aux[indices] @ self.fusing.float().T
        return fused + rows.embedding[indices + 1] @ self.first_embedding.float().T


def fit_recurrence(
    batches: Iterable[Predictions], draft: DraftModel, processes: Processes
) -> Recurrence:
    """Solve the maps on the rows of `batches`, which are read `_ROUNDS` + 1 times.

    Args:
        batches: rows of this process; can be iterated several times.
        draft: of the same sizes.
        processes: all of which call this; each gets the same maps.

    Raises:
        ConfigError: no position counts, or the states are not finite.

    """
    size, device = draft.config.hidden_size, draft.fc.weight.device
    fitted = _first_step(batches, draft.fc.in_features, size, device, processes)
    fused = fitted.state_moments
    for round_number in range(_ROUNDS):
        later = Moments(2 * size, size, device)
        for rows in batches:
            before = _before(rows, fitted, anew=round_number == 0)
            for step, state in enumerate(before, start=1):
                counted = rows.is_counted[step]
                features = torch.cat([state, rows.embeddings(step)], dim=1)
                later.add(features[counted], rows.finals(step)[counted])
        later.sum_over(processes)
        if not bool(later.num_rows.any()):  # a run of one step, or answers of one token
            return fitted
        solution = later.solve().T
        fitted = replace(
            fitted,
            carry=solution[:, :size],
            later_embedding=solution[:, size:],
            state_moments=fused + later.gram[:size, :size] / later.num_rows[0],
        )
    return fitted


def _first_step(
    batches: Iterable[Predictions],
    num_aux: int,
    size: int,
    device: torch.device,
    processes: Processes,
) -> Recurrence:
    """Solve step 0; later steps are as if they had no effect."""
    first = Moments(num_aux + size, size + 1, device)
    for rows in batches:
        counted, at = rows.is_counted[0], rows.indices[0]
        features = torch.cat([rows.aux[at], rows.embeddings(0)], dim=1)
        targets = rows.finals(0)
        targets = torch.cat([targets, torch.ones_like(targets[:, :1])], dim=1)
        first.add(features[counted], targets[counted])
    first.sum_over(processes)
    of_aux, of_embedding = slice(0, num_aux), slice(num_aux, num_aux + size)
    solution = first.solve().T[:size]
    fusing = solution[:, of_aux]
    identity = torch.eye(size, dtype=solution.dtype, device=solution.device)
    return Recurrence(
        fusing=fusing,
        first_embedding=solution[:, of_embedding],
        carry=identity,
        later_embedding=torch.zeros_like(identity),
        constant=first.solve(of_aux)[:, size],
        embedding_moments=first.unexplained(of_embedding, by=of_aux),
        num_embeddings=int(first.num_rows[0]),
        state_moments=fusing @ first.gram[of_aux, of_aux] @ fusing.T / first.num_rows[0],
    )


def _before(rows: Predictions, fitted: Recurrence, *, anew: bool) -> Iterator[Tensor]:
    """Yield for the rows of each step k > 0 the prediction that it reads [A_k, H].

    With `anew` it is the first step's at the later index: the carrying map is not known yet.
    """
    steps = range(1, len(rows.indices))
    if anew:
        yield from (fitted.first(rows, rows.indices[step] + step - 1) for step in steps)
        return
    for step, state in zip(steps, fitted.predictions(rows), strict=False):
        yield state[rows.kept(step)]
