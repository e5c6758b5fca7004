"""Soft cross-entropy against the target over the draft vocabulary, without storing logits.

Logits exist for one chunk of rows at a time: the chunk's gradient is computed in the forward pass
and only [R, H] and [D, H] gradients are kept. Rows that share a teacher token share its
distribution, which is computed once.

Shapes: R rows (position, step), U teacher tokens, H draft hidden, Ht target hidden, D draft
vocabulary.
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eagle_core.bfloat16 import widened
from eagle_core.training.config import Objective

CHUNK_ROWS = 1024
TILE_BYTES = 1 << 21
_ADDED_TOKENS = 512
_NUM_METRICS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The target's outputs for the U teacher tokens of the rows."""

    last_hidden_state: Tensor
    """[U, Ht] after the final norm"""
    head: Tensor
    """[D, Ht] rows of the target's head that are in the draft vocabulary"""
    logsumexp: Tensor
    """[U] over the full target vocabulary"""
    draft_argmax: Tensor
    """[U] int64 draft id of the target's argmax; -1 if the draft vocabulary lacks it"""
    token_of_row: Tensor
    """[R] int64, non-decreasing: index of the row's teacher token"""
    rows_of_token: Sequence[int] | None = None
    """[U] number of rows by token, on the host; None: they are counted, which waits for them"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOutcome:
    """Metrics of each row; carries no gradient."""

    cross_entropy: Tensor
    """[R] nats"""
    correct: Tensor
    """[R] bool: the draft's argmax is the target's"""
    acceptance: Tensor
    """[R] sum of min(p, q), p over the full vocabulary: acceptance probability when sampling

    NaN if gradients were computed for `cross_entropy`, which does not need it.
    """
    objective: Tensor
    """[R] value of the objective"""


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

    * `cross_entropy`: of q under p renormalised over the draft vocabulary, as in EAGLE-3.
    * `lk_alpha`: -log a (LK losses, arXiv 2602.23881).
    * `lk_hybrid`: k * cross-entropy + (1 - k) * (1 - a) with k = exp(-lk_eta * a), not
      differentiated: the divergence while acceptance is low, acceptance itself when it is high.

    Args:
        hidden: [R, H] the draft's states after its final norm, in the dtype of computation.
        head: [D, H] the draft's head.
        weights: [R] factor of each row.
        teacher: the target's outputs for the rows.
        objective: the loss of a row.
        lk_eta: of `lk_hybrid`.
        compiled: whether to fuse element-wise operations with torch.compile; needs a compiler.

    """
    task = _Task(
        objective=objective,
        lk_eta=lk_eta,
        compiled=compiled,
        wants_gradient=torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad),
        trains_head=head.requires_grad,
    )
    with torch.autocast(hidden.device.type, enabled=False):  # dtypes are explicit here
        loss, *metrics = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]  # torch
            hidden, head, weights, teacher, task
        )
    cross_entropy, correct, acceptance, minimised = metrics
    outcome = RowOutcome(
        cross_entropy=cross_entropy,
        correct=correct.bool(),
        acceptance=acceptance,
        objective=minimised,
    )
    return loss, outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    objective: Objective
    lk_eta: float
    compiled: bool
    wants_gradient: bool
    trains_head: bool

    @property
    def measures_acceptance(self) -> bool:
        return not self.wants_gradient or self.objective != "cross_entropy"


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        teacher: Teacher,
        task: _Task,
    ) -> tuple[Tensor, ...]:
        wide = widened(hidden[:1])
        metrics = tuple(wide.new_zeros(len(hidden)) for _ in range(_NUM_METRICS))
        turn_into_gradient = _compiled() if task.compiled else _turn_into_gradient
        grad_hidden = torch.empty_like(hidden) if task.wants_gradient else None
        is_trained = task.wants_gradient and task.trains_head
        grad_head = _HeadGradient(head, hidden) if is_trained else None
        compute_head = head.to(hidden.dtype)
        spans = _Spans(teacher)
        logits_buffer = hidden.new_empty(spans.longest(CHUNK_ROWS), len(head))
        for chunk in spans.of(spans.everything, max_rows=CHUNK_ROWS):
            states = hidden[chunk.rows]
            logits = torch.mm(states, compute_head.T, out=logits_buffer[: chunk.num_rows])
            teacher_logits = teacher.last_hidden_state[chunk.tokens] @ teacher.head.T
            for tile in spans.of(chunk, max_rows=_tile_rows(logits, compiled=task.compiled)):
                local = teacher.token_of_row[tile.rows] - tile.tokens.start
                tile_metrics = turn_into_gradient(
                    logits[_within(tile.rows, chunk.rows)],
                    teacher_logits[_within(tile.tokens, chunk.tokens)],
                    teacher.logsumexp[tile.tokens],
                    local,
                    teacher.draft_argmax[tile.tokens][local],
                    task.objective,
                    task.lk_eta,
                    measures_acceptance=task.measures_acceptance,
                )
                for metric, values in zip(metrics, tile_metrics, strict=True):
                    metric[tile.rows] = values
            factors = weights[chunk.rows].unsqueeze(-1)
            if grad_hidden is not None:
                torch.mm(logits, compute_head, out=grad_hidden[chunk.rows])
                grad_hidden[chunk.rows].mul_(factors)
            if grad_head is not None:
                grad_head.add(logits, (states * factors).to(states.dtype))
        ctx.gradients = grad_hidden, None if grad_head is None else grad_head.total()
        ctx.mark_non_differentiable(*metrics)
        return (weights * metrics[-1]).sum(), *metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # scaled in place, so valid for one backward pass only
        if grads[0].device.type != "cpu" or grads[0] != 1:  # a GPU must not wait for the result
            for gradient in (grad_hidden, grad_head):
                if gradient is not None:
                    gradient.mul_(grads[0])
        return grad_hidden, grad_head, None, None, None


class _HeadGradient:
    """[D, H] the sum, over chunks of r rows, of slopes^T [D, r] times states [r, H].

    A low-precision product is widened while it is in the cache: adding all of it at once takes a
    third as long as the multiplication. On a CPU the sum is kept transposed, since products of
    slopes in their own order are made 1.6 times as fast.
    """

    def __init__(self, head: Tensor, states: Tensor) -> None:
        """Begin with zeros for `head` [D, H], from states of this dtype."""
        is_low = states.dtype != head.dtype
        self._is_transposed = is_low and head.device.type == "cpu"
        self._adds_parts = is_low
        # Not `zeros_like` of a transposed head, which would have the order of the head's memory.
        self._sum = head.new_zeros(head.shape[::-1] if self._is_transposed else head.shape)

    def add(self, slopes: Tensor, states: Tensor) -> None:
        """Add the product of one chunk."""
        if not self._adds_parts:
            self._sum.addmm_(slopes.T, states)
            return
        states_t = states.T.contiguous() if self._is_transposed else states
        for part in _parts(slopes.shape[1]):
            if self._is_transposed:
                self._sum[:, part].add_(states_t @ slopes[:, part])
            else:
                self._sum[part].add_(slopes[:, part].T @ states)

    def total(self) -> Tensor:
        """Return the sum, [D, H]."""
        if not self._is_transposed:
            return self._sum
        total = self._sum.new_empty(self._sum.shape[::-1])
        for part in _parts(len(total)):  # in the cache
            total[part] = self._sum[:, part].contiguous().T
        return total


def _parts(num_tokens: int) -> Iterator[slice]:
    return (slice(n, n + _ADDED_TOKENS) for n in range(0, num_tokens, _ADDED_TOKENS))


def _turn_into_gradient(
    logits: Tensor,
    teacher_logits: Tensor,
    logsumexp: Tensor,
    local: Tensor,
    draft_argmax: Tensor,
    objective: Objective,
    lk_eta: float,
    *,
    measures_acceptance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overwrite logits [r, D] with the objective's derivative; return the metrics of the rows.

    Few passes over few rows: a tile stays in the processor's cache, and only the softmax
    exponentiates.

    Args:
        logits: [r, D]
        teacher_logits: [u, D] the target's logits of the tile's tokens.
        logsumexp: [u] of the target's full vocabulary.
        local: [r] index of a row's teacher token in the tile.
        draft_argmax: [r] draft id of the target's argmax, or -1.
        objective: the loss of a row.
        lk_eta: of `lk_hybrid`.
        measures_acceptance: whether to compute it; all objectives but `cross_entropy` need it.

    Returns:
        [r] each: cross-entropy, correct (0 or 1), acceptance (or NaN), objective.

    """
    probability, target_lse, _ = _softmax(widened(teacher_logits))
    p = probability.index_select(0, local)
    values = widened(logits)
    mean_logit = torch.linalg.vecdot(p, values)
    chosen = values.gather(1, draft_argmax.clamp(min=0).unsqueeze(1)).squeeze(1)
    first = values.argmax(dim=-1) if measures_acceptance else draft_argmax
    q, lse, highest = _softmax(values)
    # Decoding takes the first of equal logits, common in bfloat16; in training any of them will do.
    is_highest = first == draft_argmax if measures_acceptance else chosen >= highest
    correct = is_highest & (draft_argmax >= 0)
    cross_entropy = lse - mean_logit
    acceptance = torch.full_like(cross_entropy, float("nan"))
    if measures_acceptance:
        share = (target_lse - logsumexp).exp().clamp(max=1.0)
        scaled = (probability * share.unsqueeze(-1)).index_select(0, local)
        acceptance = torch.minimum(scaled, q).sum(dim=-1)
    if objective == "cross_entropy":
        minimised, slope = cross_entropy, q.sub_(p)
    else:
        below_target = torch.where(q < scaled, q, 0)  # raising these raises acceptance
        # slope of 1 - acceptance
        rejection_slope = q * below_target.sum(dim=-1, keepdim=True) - below_target
        if objective == "lk_alpha":
            floor = acceptance.clamp(min=torch.finfo(acceptance.dtype).tiny)
            minimised, slope = -floor.log(), rejection_slope / floor.unsqueeze(-1)
        else:
            k = torch.exp(-lk_eta * acceptance)
            minimised = k * cross_entropy + (1 - k) * (1 - acceptance)
            slope = torch.lerp(rejection_slope, q.sub_(p), k.unsqueeze(-1))
    logits.copy_(slope)
    return cross_entropy, correct.to(acceptance.dtype), acceptance, minimised


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (softmax, log-sum-exp, maximum) over the last dimension.

    The largest probability is exp(0) over the sum of exponentials, so it gives the log-sum-exp.
    """
    probability, highest = torch.softmax(logits, dim=-1), logits.amax(dim=-1)
    return probability, highest - probability.amax(dim=-1).log(), highest


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return `_turn_into_gradient` as one fused kernel; the first call takes seconds."""
    compiled: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = torch.compile(
        _turn_into_gradient, dynamic=True
    )
    return compiled


def _tile_rows(logits: Tensor, *, compiled: bool) -> int:
    """Return the rows per tile: a whole chunk where smaller tiles have no benefit."""
    if compiled or logits.device.type != "cpu":
        return len(logits)
    return TILE_BYTES // (4 * logits.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Consecutive teacher tokens, and the rows that they teach."""

    rows: slice
    tokens: slice

    @property
    def num_rows(self) -> int:
        return len(range(self.rows.start, self.rows.stop))


class _Spans:
    """Splits rows at the borders between teacher tokens."""

    def __init__(self, teacher: Teacher) -> None:
        counts = teacher.rows_of_token
        if counts is None:
            counts = torch.bincount(teacher.token_of_row).tolist()
        self._ends = [0, *itertools.accumulate(counts)]
        self.everything = _Span(rows=slice(0, self._ends[-1]), tokens=slice(0, len(counts)))

    def of(self, whole: _Span, *, max_rows: int) -> Iterator[_Span]:
        """Yield parts of `whole` with at most `max_rows` rows, or with a single teacher token."""
        first, end = whole.tokens.start, whole.tokens.stop
        while first < end:
            start = self._ends[first]
            last = bisect.bisect_right(self._ends, start + max_rows, lo=first, hi=end + 1) - 1
            last = max(last, first + 1)
            yield _Span(rows=slice(start, self._ends[last]), tokens=slice(first, last))
            first = last

    def longest(self, max_rows: int) -> int:
        """Return the number of rows of the longest part of `everything`."""
        parts = self.of(self.everything, max_rows=max_rows)
        return max((part.num_rows for part in parts), default=0)


def _within(span: slice, whole: slice) -> slice:
    return slice(span.start - whole.start, span.stop - whole.start)
