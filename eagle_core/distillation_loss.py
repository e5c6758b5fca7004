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

CHUNK_ROWS = 1024


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
        cross_entropy = weights.new_zeros(num_rows)
        acceptance = weights.new_zeros(num_rows)
        correct = torch.zeros(num_rows, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_gradient else None
        grad_head = torch.zeros_like(head) if needs_gradient else None
        for rows, tokens in _chunks(teacher.token_of_row):
            local = teacher.token_of_row[rows] - tokens.start
            probability, share = _teacher_probability(teacher, tokens)
            p = probability[local]
            logits = (hidden[rows] @ head.T).float()
            lse = logits.logsumexp(dim=-1)
            cross_entropy[rows] = lse - (p * logits).sum(dim=-1)
            correct[rows] = logits.argmax(dim=-1) == teacher.choice[tokens][local]
            q = logits.sub_(lse.unsqueeze(-1)).exp_()
            acceptance[rows] = torch.minimum(p * share[local].unsqueeze(-1), q).sum(dim=-1)
            if grad_hidden is not None and grad_head is not None:
                gradient = q.sub_(p).mul_(weights[rows].unsqueeze(-1)).to(hidden.dtype)
                grad_hidden[rows] = gradient @ head
                grad_head.addmm_(gradient.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(cross_entropy, correct, acceptance)
        return (weights * cross_entropy).sum(), cross_entropy, correct, acceptance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0], grad_head * grads[0], None, None


def _teacher_probability(teacher: Teacher, tokens: slice) -> tuple[Tensor, Tensor]:
    """Return (softmax over the draft vocabulary [u, D], its share of the full vocabulary [u])."""
    logits = (teacher.last_hidden_state[tokens] @ teacher.head.T).float()
    lse = logits.logsumexp(dim=-1)
    share = (lse - teacher.logsumexp[tokens]).exp().clamp(max=1.0)
    return logits.sub_(lse.unsqueeze(-1)).exp_(), share


def _chunks(token_of_row: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, teacher tokens) slices of about CHUNK_ROWS rows that end between two tokens."""
    counts = torch.bincount(token_of_row).cpu()
    ends = counts.cumsum(0).tolist()
    first_row = first_token = 0
    for token, end in enumerate(ends):
        if end - first_row >= CHUNK_ROWS or token == len(ends) - 1:
            yield slice(first_row, end), slice(first_token, token + 1)
            first_row, first_token = end, token + 1
