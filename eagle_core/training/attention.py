"""Training-time-test attention: causal over step-0 keys, plus the index's own later keys.

No T x T x steps matrix: a query at step i sees the step-0 keys at or before its index in its own
sequence, and the i keys of its own index from steps 1..i. Scores exist for one block of queries at
a time, against all keys that the block can see; the backward pass recomputes them (as in
FlashAttention, arXiv 2205.14135, with the own keys as additional columns).

With a sliding window a query sees keys at the last W positions. At index t of step i its own
position is t + i, the step-0 key j is at j, and the own key of step k at t + k.

Shapes: Q queries, B queries of a block, S step-0 keys of one sequence, s keys that a block sees, I
own keys per query, N heads, K key-value heads, G = N / K, E head size, W sliding window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle_core.bfloat16 import widened
from eagle_core.training.step_plan import HostRows

BLOCK_QUERIES = 256


def ttt_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    index: Tensor,
    before: int | None = None,
    host_index: Tensor | None = None,
) -> Tensor:
    """Return the attention output [Q, N, E] for the queries of one sequence.

    Args:
        query: [Q, N, E]
        keys: [S, K, E], step 0; keys after the last query may be omitted.
        values: [S, K, E]
        own_keys: [Q, I, K, E], steps 1..i, oldest first.
        own_values: [Q, I, K, E]
        index: [Q] index of each query in its sequence, ascending.
        before: how many step-0 keys before its index a query sees, at most; -1: not that of its
            index either; None: all.
        host_index: `index` on the host, if it is there: else it is copied, which waits for it.

    """
    host_index = index.cpu() if host_index is None else host_index
    with torch.autocast(query.device.type, enabled=False):  # dtypes are explicit here
        attention_output: Tensor = _TttAttention.apply(
            query, keys, values, own_keys, own_values, _Queries(index, host_index, before)
        )  # type: ignore[no-untyped-call]  # torch
    return attention_output


def packed_ttt_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    indices: Tensor,
    first: Tensor,
    window: int | None = None,
    *,
    host: HostRows | None = None,
) -> Tensor:
    """Return the attention output [A, N, E] for a packed batch, one sequence at a time.

    Args:
        query: [A, N, E]
        keys: [S, K, E], step 0, of all sequences, concatenated.
        values: [S, K, E]
        own_keys: [A, I, K, E], steps 1..i, oldest first.
        own_values: [A, I, K, E]
        indices: [A] index of each query in the batch, ascending.
        first: [A] index of the first token of its sequence.
        window: W; None: a query sees all keys before it.
        host: `indices` and `first` on the host, if they are there.

    """
    if not len(query):
        return no_queries(query, keys, values)
    host = HostRows.of(indices, first) if host is None else host
    before = keys_before(window, own_keys.shape[1])
    own_keys, own_values = in_window(own_keys, window), in_window(own_values, window)
    starts, counts = torch.unique_consecutive(host.first, return_counts=True)
    ends = counts.cumsum(0).tolist()
    attention_output = []
    for start, begin, end in zip(starts.tolist(), [0, *ends], ends, strict=False):
        members = slice(begin, end)
        visible = slice(start, int(host.indices[end - 1]) + 1)  # omit keys after the last query
        attention_output.append(
            ttt_attention(
                query[members],
                keys[visible],
                values[visible],
                own_keys[members],
                own_values[members],
                indices[members] - start,
                before,
                host.indices[members] - start,
            )
        )
    return torch.cat(attention_output)


def keys_before(window: int | None, step: int) -> int | None:
    """Return how many step-0 keys before its index a query of `step` sees; -1 if none at all."""
    return None if window is None else max(window - step, 0) - 1


def in_window(own: Tensor, window: int | None) -> Tensor:
    """Return the own keys or values [A, I, K, E] that a query sees: at most the W newest."""
    return own if window is None else own[:, -window:]


def no_queries(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return [0, N, E] that still depends on all three.

    Ranks that share gradients wait for each other's, zero or not: a batch without any counted
    position must also have a gradient for every parameter.
    """
    return query + (keys.sum() + values.sum()) * 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Consecutive queries of a sequence."""

    rows: slice
    seen: slice
    """The step-0 keys that any query of the block sees."""
    index: Tensor
    """[B]"""
    first: int
    """That of the first query."""
    last: int
    before: int | None

    @property
    def num_keys(self) -> int:
        """Return s."""
        return int(self.seen.stop - self.seen.start)

    def hide(self, scores: Tensor) -> None:
        """Set scores [K, B, G, s + I] of keys that their query does not see to minus infinity."""
        if not self.num_keys:
            return
        start, end = self.seen.start, self.seen.stop
        seen_by_all = self.first + 1
        later = torch.arange(seen_by_all, end, device=scores.device)
        hidden = later > self.index.unsqueeze(1)  # [B, end - seen_by_all]
        of_later = scores[..., seen_by_all - start : end - start]
        of_later.masked_fill_(hidden.unsqueeze(1), float("-inf"))
        if self.before is not None:
            last_oldest = self.last - self.before  # seen by all, unless it is later
            early = torch.arange(start, max(last_oldest, start), device=scores.device)
            hidden = early < (self.index - self.before).unsqueeze(1)
            scores[..., : len(early)].masked_fill_(hidden.unsqueeze(1), float("-inf"))


@dataclass(frozen=True, slots=True, eq=False)
class _Queries:
    """The queries of a sequence."""

    index: Tensor
    """[Q]"""
    host_index: Tensor
    """The same on the host"""
    before: int | None

    def blocks(self) -> Iterator[_Block]:
        """Yield blocks of queries.

        With a window they also end where indices have a gap, so that a block sees at most
        `BLOCK_QUERIES` + W keys.
        """
        first = 0
        while first < len(self.host_index):
            members = self.host_index[first : first + BLOCK_QUERIES]
            oldest = 0
            if self.before is not None:
                limit = members[0] + BLOCK_QUERIES
                members = members[: int(torch.searchsorted(members, limit))]
                oldest = max(0, int(members[0]) - self.before)
            rows = slice(first, first + len(members))
            end = 0 if self.before == -1 else int(members[-1]) + 1
            yield _Block(
                rows=rows,
                seen=slice(min(oldest, end), end),
                index=self.index[rows],
                first=int(members[0]),
                last=int(members[-1]),
                before=self.before,
            )
            first = rows.stop


class _TttAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        queries: _Queries,
    ) -> Tensor:
        grouped, by_head = _grouped(query, keys.shape[1]), keys.transpose(0, 1).contiguous()
        values_by_head = values.transpose(0, 1).contiguous()
        attention_output = torch.empty_like(grouped)
        for block in queries.blocks():
            own = own_keys[block.rows].permute(2, 0, 1, 3)
            weights = _weights(grouped[:, block.rows], by_head, own, block).to(query.dtype)
            attention_output[:, block.rows] = _weighted_values(
                weights, values_by_head, own_values[block.rows], block
            )
        ctx.save_for_backward(grouped, by_head, values_by_head, own_keys, own_values)
        ctx.attention_output, ctx.queries = attention_output, queries
        return _ungrouped(attention_output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grouped, keys, values, own_keys, own_values = ctx.saved_tensors
        grad_output = _grouped(grads[0], keys.shape[0])
        offset = _row_sums(grad_output, ctx.attention_output)
        grad_query = torch.empty_like(grouped)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        grad_own_keys = torch.empty_like(own_keys)
        grad_own_values = torch.empty_like(own_values)
        scale = grouped.shape[-1] ** -0.5
        for block in ctx.queries.blocks():
            rows, seen = block.rows, block.seen
            query, grad = grouped[:, rows], grad_output[:, rows]
            own_key = own_keys[rows].permute(2, 0, 1, 3)  # [K, B, I, E]
            own_value = own_values[rows].permute(2, 0, 1, 3)
            weights = _weights(query, keys, own_key, block)
            slope = _scores_of(grad, values[:, seen], own_value)
            slope.sub_(offset[:, rows]).mul_(weights).mul_(scale)
            weights, slope = weights.to(query.dtype), slope.to(query.dtype)
            flat_weights, flat_slope = (
                x[..., : block.num_keys].flatten(1, 2) for x in (weights, slope)
            )
            flat_query, flat_grad = query.flatten(1, 2), grad.flatten(1, 2)
            grad_values[:, seen] += flat_weights.transpose(1, 2) @ flat_grad
            grad_keys[:, seen] += flat_slope.transpose(1, 2) @ flat_query
            grad_query[:, rows] = (flat_slope @ keys[:, seen]).view_as(query)
            own_weights, own_slope = weights[..., block.num_keys :], slope[..., block.num_keys :]
            if own_slope.shape[-1]:
                grad_query[:, rows] += own_slope @ own_key
                grad_own_keys[rows] = (own_slope.transpose(2, 3) @ query).permute(1, 2, 0, 3)
                grad_own_values[rows] = (own_weights.transpose(2, 3) @ grad).permute(1, 2, 0, 3)
        return (
            _ungrouped(grad_query),
            grad_keys.transpose(0, 1),
            grad_values.transpose(0, 1),
            grad_own_keys,
            grad_own_values,
            None,
        )


def _row_sums(grad_output: Tensor, attention_output: Tensor) -> Tensor:
    """Return [..., 1] the sums of products of two tensors [..., E], without rounding products."""
    return (widened(grad_output) * attention_output).sum(dim=-1, keepdim=True)


def _weights(query: Tensor, keys: Tensor, own_keys: Tensor, block: _Block) -> Tensor:
    """Return attention weights [K, B, G, s + I] in float32, 0 where a key is hidden."""
    scores = _scores_of(query, keys[:, block.seen], own_keys).mul_(query.shape[-1] ** -0.5)
    block.hide(scores)
    return scores.softmax(dim=-1)


def _scores_of(left: Tensor, shared: Tensor, own: Tensor) -> Tensor:
    """Return products [K, B, G, s + I] of left [K, B, G, E], shared [K, s, E], own [K, B, I, E]."""
    of_shared = (left.flatten(1, 2) @ shared.transpose(1, 2)).view(*left.shape[:3], -1)
    if not own.shape[2]:
        return widened(of_shared)
    return widened(torch.cat([of_shared, left @ own.transpose(2, 3)], dim=-1))


def _weighted_values(weights: Tensor, values: Tensor, own_values: Tensor, block: _Block) -> Tensor:
    """Return the attention output [K, B, G, E] for weights [K, B, G, s + I]."""
    of_shared = weights[..., : block.num_keys].flatten(1, 2) @ values[:, block.seen]
    attention_output = of_shared.view(*weights.shape[:3], -1)
    if own_values.shape[1]:
        attention_output = attention_output + weights[..., block.num_keys :] @ own_values.permute(
            2, 0, 1, 3
        )
    return attention_output


def _grouped(states: Tensor, num_groups: int) -> Tensor:
    """Return [K, Q, G, E] for [Q, N, E]."""
    num_queries, _, head_dim = states.shape
    return states.reshape(num_queries, num_groups, -1, head_dim).transpose(0, 1).contiguous()


def _ungrouped(states: Tensor) -> Tensor:
    """Return [Q, N, E] for [K, Q, G, E]."""
    return states.transpose(0, 1).flatten(1, 2)
