"""Soft cross-entropy against the target over the draft vocabulary, without keeping any logits.

Logits exist for one chunk of rows at a time: the chunk's gradient is made in the forward pass and
only [R, H] and [D, H] gradients are kept. Rows that share a teacher token share its distribution,
which is computed once.

Shapes: R rows (position, step), U teacher tokens, H draft hidden, Ht target hidden, D draft
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eagle_core.tensors import widened

Objective = Literal["cross_entropy", "lk_alpha", "lk_hybrid"]

CHUNK_ROWS = 1024
TILE_BYTES = 1 << 21


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """What the target says about the U tokens that some row is taught by."""

    last_hidden_state: Tensor
    """[U, Ht] after the final norm"""
    head: Tensor
    """[D, Ht] rows of the target's head that are in the draft vocabulary"""
    logsumexp: Tensor
    """[U] over the full target vocabulary"""
    choice: Tensor
    """[U] int64 draft id of the target's argmax; -1 if the draft vocabulary lacks it"""
    token_of_row: Tensor
    """[R] int64, non-decreasing: which teacher token teaches the row"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOutcome:
    """What became of each row; carries no gradient."""

    cross_entropy: Tensor
    """[R] nats"""
    correct: Tensor
    """[R] bool: the draft's argmax is the target's"""
    acceptance: Tensor
    """[R] sum of min(p, q), p over the full vocabulary: chance of acceptance when sampling"""
    objective: Tensor
    """[R] what is minimised"""


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    weights: Tensor,
    teacher: Teacher,
    *,
    objective: Objective = "cross_entropy",
    lk_eta: float = 3.0,
) -> tuple[Tensor, RowOutcome]:
    """Return (sum of weights times the objective, each row's outcome).

    With a the acceptance of a row, p the target's and q the draft's distribution:

    * `cross_entropy`: of q under p renormalised over the draft vocabulary, as EAGLE-3 trains.
    * `lk_alpha`: -log a (LK losses, arXiv 2602.23881).
    * `lk_hybrid`: k * cross-entropy + (1 - k) * (1 - a) with k = exp(-lk_eta * a), not
      differentiated: divergence while acceptance is low, acceptance itself when it is high.

    Args:
        hidden: [R, H] the draft's states after its final norm, in the dtype of computation.
        head: [D, H] the draft's head.
        weights: [R] factor of each row.
        teacher: what the rows learn from.
        objective: what is minimised.
        lk_eta: of `lk_hybrid`.

    """
    with torch.autocast(hidden.device.type, enabled=False):  # dtypes are chosen here
        loss, *figures = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]  # torch
            hidden, head, weights, teacher, objective, lk_eta
        )
    cross_entropy, correct, acceptance, minimised = figures
    outcome = RowOutcome(
        cross_entropy=cross_entropy,
        correct=correct,
        acceptance=acceptance,
        objective=minimised,
    )
    return loss, outcome


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        teacher: Teacher,
        objective: Objective,
        lk_eta: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        num_rows = len(hidden)
        needs_gradient = hidden.requires_grad or head.requires_grad
        outcome = RowOutcome(
            cross_entropy=widened(hidden[:1]).new_zeros(num_rows),
            correct=torch.zeros(num_rows, dtype=torch.bool, device=hidden.device),
            acceptance=widened(hidden[:1]).new_zeros(num_rows),
            objective=widened(hidden[:1]).new_zeros(num_rows),
        )
        grad_hidden = torch.zeros_like(hidden) if needs_gradient else None
        grad_head = torch.zeros_like(head) if needs_gradient else None
        compute_head = head.to(hidden.dtype)
        for rows, tokens in _chunks(teacher.token_of_row):
            probability, share = _teacher_probability(teacher, tokens)
            logits = widened(hidden[rows] @ compute_head.T)
            for tile in _tiles(logits):
                members = slice(rows.start + tile.start, rows.start + tile.stop)
                token = teacher.token_of_row[members]
                local = token - tokens.start
                p = probability[local]
                choice = teacher.choice[token]
                tile_logits = logits[tile]
                q = _judge(tile_logits, p, share[local], choice, outcome, members)
                slope = _slope(q, p, share[local], outcome, members, objective, lk_eta)
                torch.mul(slope, weights[members].unsqueeze(-1), out=tile_logits)
            if grad_hidden is not None and grad_head is not None:
                gradient = logits.to(hidden.dtype)
                grad_hidden[rows] = gradient @ compute_head
                if gradient.dtype == grad_head.dtype:
                    grad_head.addmm_(gradient.T, hidden[rows])
                else:
                    grad_head += gradient.T @ hidden[rows]
        ctx.gradients = grad_hidden, grad_head
        figures = (outcome.cross_entropy, outcome.correct, outcome.acceptance, outcome.objective)
        ctx.mark_non_differentiable(*figures)
        return (weights * outcome.objective).sum(), *figures

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # they are scaled in place, and so good for one backward pass only
        return grad_hidden.mul_(grads[0]), grad_head.mul_(grads[0]), None, None, None, None


def _judge(
    logits: Tensor,
    p: Tensor,
    share: Tensor,
    choice: Tensor,
    outcome: RowOutcome,
    rows: slice,
) -> Tensor:
    """Return the draft's distribution [r, D] for logits [r, D], and note how the rows fare.

    Few passes over few rows: a tile stays in the processor's cache, and softmax is the one pass
    that exponentiates. Its largest value is exp(0) over the sum of exponentials.
    """
    highest = logits.amax(dim=-1)
    chosen = logits.gather(1, choice.clamp(min=0).unsqueeze(1)).squeeze(1)
    outcome.correct[rows] = (chosen >= highest) & (choice >= 0)
    mean_logit = torch.linalg.vecdot(p, logits)
    q = torch.softmax(logits, dim=-1)
    outcome.cross_entropy[rows] = highest - q.amax(dim=-1).log() - mean_logit
    outcome.acceptance[rows] = torch.minimum(p * share.unsqueeze(-1), q).sum(dim=-1)
    return q


def _slope(
    q: Tensor,
    p: Tensor,
    share: Tensor,
    outcome: RowOutcome,
    rows: slice,
    objective: Objective,
    lk_eta: float,
) -> Tensor:
    """Note each row's objective; return its derivative [r, D] by the logits. Overwrites `q`."""
    cross_entropy, acceptance = outcome.cross_entropy[rows], outcome.acceptance[rows]
    if objective == "cross_entropy":
        outcome.objective[rows] = cross_entropy
        return q.sub_(p)
    lacking = torch.where(q < p * share.unsqueeze(-1), q, 0)  # more of these would be accepted
    away = torch.addcmul(-lacking, q, lacking.sum(dim=-1, keepdim=True))  # of 1 - acceptance
    if objective == "lk_alpha":
        floor = acceptance.clamp(min=torch.finfo(acceptance.dtype).tiny)
        outcome.objective[rows] = -floor.log()
        return away / floor.unsqueeze(-1)
    kept = torch.exp(-lk_eta * acceptance)
    outcome.objective[rows] = kept * cross_entropy + (1 - kept) * (1 - acceptance)
    return torch.lerp(away, q.sub_(p), kept.unsqueeze(-1))


def _teacher_probability(teacher: Teacher, tokens: slice) -> tuple[Tensor, Tensor]:
    """Return (softmax over the draft vocabulary [u, D], its share of the full vocabulary [u])."""
    last = teacher.last_hidden_state[tokens]
    logits = widened(last @ teacher.head.T)
    probability = torch.softmax(logits, dim=-1)
    lse = logits.amax(dim=-1) - probability.amax(dim=-1).log()
    return probability, (lse - teacher.logsumexp[tokens]).exp().clamp(max=1.0)


def _tiles(logits: Tensor) -> Iterator[slice]:
    """Yield slices of rows: all at once on an accelerator, which has no use for small ones."""
    row_bytes = logits.shape[1] * logits.element_size()
    rows = max(1, TILE_BYTES // row_bytes) if logits.device.type == "cpu" else len(logits)
    for first in range(0, len(logits), max(1, rows)):
        yield slice(first, min(first + rows, len(logits)))


def _chunks(token_of_row: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, teacher tokens) slices of about CHUNK_ROWS rows that end between two tokens."""
    counts = torch.bincount(token_of_row).cpu()
    ends = counts.cumsum(0).tolist()
    first_row = first_token = 0
    for token, end in enumerate(ends):
        if end - first_row >= CHUNK_ROWS or token == len(ends) - 1:
            yield slice(first_row, end), slice(first_token, token + 1)
            first_row, first_token = end, token + 1
