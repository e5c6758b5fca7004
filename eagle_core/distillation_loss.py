"""Soft cross-entropy against the target over the draft vocabulary, without keeping any logits.

Logits exist for one chunk of rows at a time: the chunk's gradient is made in the forward pass and
only [R, H] and [D, H] gradients are kept. Rows that share a teacher token share its distribution,
which is computed once.

Shapes: R rows (position, step), U teacher tokens, H draft hidden, Ht target hidden, D draft
vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from eagle_core.tensors import widened

Objective = Literal["cross_entropy", "lk_alpha", "lk_hybrid"]

CHUNK_ROWS = 1024
TILE_BYTES = 1 << 21
_NUM_FIGURES = 4


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
    compiled: bool = False,
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
        compiled: whether to fuse the element-wise work with torch.compile, which needs a compiler.

    """
    with torch.autocast(hidden.device.type, enabled=False):  # dtypes are chosen here
        loss, *figures = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]  # torch
            hidden, head, weights, teacher, objective, lk_eta, compiled
        )
    cross_entropy, correct, acceptance, minimised = figures
    outcome = RowOutcome(
        cross_entropy=cross_entropy,
        correct=correct.bool(),
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
        compiled: bool,
    ) -> tuple[Tensor, ...]:
        num_rows = len(hidden)
        needs_gradient = hidden.requires_grad or head.requires_grad
        wide = widened(hidden[:1])
        figures = tuple(wide.new_zeros(num_rows) for _ in range(_NUM_FIGURES))
        turn_into_gradient = _compiled() if compiled else _turn_into_gradient
        grad_hidden = torch.zeros_like(hidden) if needs_gradient else None
        grad_head = torch.zeros_like(head) if needs_gradient else None
        compute_head = head.to(hidden.dtype)
        for rows, tokens in _chunks(teacher.token_of_row):
            probability, share = _teacher_probability(teacher, tokens)
            logits = widened(hidden[rows] @ compute_head.T)
            for tile in _tiles(logits, compiled=compiled):
                members = slice(rows.start + tile.start, rows.start + tile.stop)
                token = teacher.token_of_row[members]
                local = token - tokens.start
                found = turn_into_gradient(
                    logits[tile],
                    probability,
                    share,
                    local,
                    teacher.choice[token],
                    weights[members],
                    objective,
                    lk_eta,
                )
                for kept, values in zip(figures, found, strict=True):
                    kept[members] = values
            if grad_hidden is not None and grad_head is not None:
                gradient = logits.to(hidden.dtype)
                grad_hidden[rows] = gradient @ compute_head
                if gradient.dtype == grad_head.dtype:
                    grad_head.addmm_(gradient.T, hidden[rows])
                else:
                    grad_head += gradient.T @ hidden[rows]
        ctx.gradients = grad_hidden, grad_head
        ctx.mark_non_differentiable(*figures)
        return (weights * figures[-1]).sum(), *figures

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # they are scaled in place, and so good for one backward pass only
        return grad_hidden.mul_(grads[0]), grad_head.mul_(grads[0]), None, None, None, None, None


def _turn_into_gradient(
    logits: Tensor,
    probability: Tensor,
    share: Tensor,
    local: Tensor,
    choice: Tensor,
    weights: Tensor,
    objective: Objective,
    lk_eta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overwrite logits [r, D] with the loss's derivative; return how the rows fare.

    Few passes over few rows: a tile stays in the processor's cache, and softmax is the one pass
    that exponentiates. Its largest value is exp(0) over the sum of exponentials.

    Args:
        logits: [r, D]
        probability: [u, D] the teacher's, of the chunk's tokens.
        share: [u] of the full vocabulary.
        local: [r] which of the tokens teaches a row.
        choice: [r] draft id of the target's argmax, or -1.
        weights: [r]
        objective: what is minimised.
        lk_eta: of `lk_hybrid`.

    Returns:
        [r] each: cross-entropy, correct (0 or 1), acceptance, objective.

    """
    p = probability[local]
    scaled = p * share[local].unsqueeze(-1)
    highest = logits.amax(dim=-1)
    chosen = logits.gather(1, choice.clamp(min=0).unsqueeze(1)).squeeze(1)
    correct = (chosen >= highest) & (choice >= 0)
    mean_logit = torch.linalg.vecdot(p, logits)
    q = torch.softmax(logits, dim=-1)
    cross_entropy = highest - q.amax(dim=-1).log() - mean_logit
    acceptance = torch.minimum(scaled, q).sum(dim=-1)
    if objective == "cross_entropy":
        minimised, slope = cross_entropy, q.sub_(p)
    else:
        lacking = torch.where(q < scaled, q, 0)  # more of these would be accepted
        away = q * lacking.sum(dim=-1, keepdim=True) - lacking  # slope of 1 - acceptance
        if objective == "lk_alpha":
            floor = acceptance.clamp(min=torch.finfo(acceptance.dtype).tiny)
            minimised, slope = -floor.log(), away / floor.unsqueeze(-1)
        else:
            kept = torch.exp(-lk_eta * acceptance)
            minimised = kept * cross_entropy + (1 - kept) * (1 - acceptance)
            slope = torch.lerp(away, q.sub_(p), kept.unsqueeze(-1))
    torch.mul(slope, weights.unsqueeze(-1), out=logits)
    return cross_entropy, correct.to(acceptance.dtype), acceptance, minimised


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return `_turn_into_gradient` as one fused kernel; the first call takes seconds."""
    compiled: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = torch.compile(
        _turn_into_gradient, dynamic=True
    )
    return compiled


def _teacher_probability(teacher: Teacher, tokens: slice) -> tuple[Tensor, Tensor]:
    """Return (softmax over the draft vocabulary [u, D], its share of the full vocabulary [u])."""
    last = teacher.last_hidden_state[tokens]
    logits = widened(last @ teacher.head.T)
    probability = torch.softmax(logits, dim=-1)
    lse = logits.amax(dim=-1) - probability.amax(dim=-1).log()
    return probability, (lse - teacher.logsumexp[tokens]).exp().clamp(max=1.0)


def _tiles(logits: Tensor, *, compiled: bool) -> Iterator[slice]:
    """Yield slices of rows: all at once where small ones are of no use."""
    row_bytes = logits.shape[1] * logits.element_size()
    is_eager_cpu = logits.device.type == "cpu" and not compiled
    rows = max(1, TILE_BYTES // row_bytes) if is_eager_cpu else len(logits)
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
