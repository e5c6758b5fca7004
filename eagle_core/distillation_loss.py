"""Soft cross-entropy against the target over the draft vocabulary, without keeping any logits.

Logits exist for one chunk of rows at a time: the chunk's gradient is made in the forward pass and
only [R, H] and [D, H] gradients are kept. Rows that share a teacher token share its distribution,
which is computed once.

Shapes: R rows (position, step), U teacher tokens, H draft hidden, Ht target hidden, D draft
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle_core.tensors import widened

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


def distillation_loss(
    hidden: Tensor, head: Tensor, weights: Tensor, teacher: Teacher
) -> tuple[Tensor, RowOutcome]:
    """Return (sum of weights times cross-entropy, each row's outcome).

    Args:
        hidden: [R, H] the draft's states after its final norm.
        head: [D, H] the draft's head.
        weights: [R] factor of each row.
        teacher: what the rows learn from.

    """
    loss, cross_entropy, correct, acceptance = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]  # torch
        hidden, head, weights, teacher
    )
    outcome = RowOutcome(cross_entropy=cross_entropy, correct=correct, acceptance=acceptance)
    return loss, outcome


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        teacher: Teacher,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_rows = len(hidden)
        needs_gradient = hidden.requires_grad or head.requires_grad
        outcome = RowOutcome(
            cross_entropy=widened(hidden[:1]).new_zeros(num_rows),
            correct=torch.zeros(num_rows, dtype=torch.bool, device=hidden.device),
            acceptance=widened(hidden[:1]).new_zeros(num_rows),
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
                _finish(logits[tile], p, share[local], choice, weights[members], outcome, members)
            if grad_hidden is not None and grad_head is not None:
                gradient = logits.to(hidden.dtype)
                grad_hidden[rows] = gradient @ compute_head
                if gradient.dtype == grad_head.dtype:
                    grad_head.addmm_(gradient.T, hidden[rows])
                else:
                    grad_head += gradient.T @ hidden[rows]
        ctx.gradients = grad_hidden, grad_head
        ctx.mark_non_differentiable(outcome.cross_entropy, outcome.correct, outcome.acceptance)
        loss = (weights * outcome.cross_entropy).sum()
        return loss, outcome.cross_entropy, outcome.correct, outcome.acceptance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # they are scaled in place, and so good for one backward pass only
        return grad_hidden.mul_(grads[0]), grad_head.mul_(grads[0]), None, None


def _finish(
    logits: Tensor,
    p: Tensor,
    share: Tensor,
    choice: Tensor,
    weights: Tensor,
    outcome: RowOutcome,
    rows: slice,
) -> None:
    """Turn logits [r, D] into their gradient in place, and write what became of the rows.

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
    weight = weights.unsqueeze(-1)
    torch.mul(q, weight, out=logits)
    logits.addcmul_(p, weight, value=-1)


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
