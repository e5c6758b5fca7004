"""The training-time-test step of EAGLE-3 (arXiv 2503.01840): only the work that gradients need.

At index t of step i the draft reads the embedding of token t+1+i and its own hidden state, and is
taught the target's distribution after token t+1+i; rotary position is t+i. Against the plain
formulation (docs/design.md, section 5): prompt positions give step-0 keys and values only, the
embedding half of the projections is computed once a token, the teacher once a token, and logits
exist for one chunk of rows at a time.

Shapes: N packed tokens, A_i indices of step i, H draft hidden, L steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from eagle_core.active import ActivePositions, LossPositions, LossReduction, active_positions
from eagle_core.distillation_loss import Objective, RowOutcome, Teacher, distillation_loss
from eagle_core.draft import DraftLayer, DraftModel, rotary, rotate
from eagle_core.packing import PackedBatch
from eagle_core.tensors import widened
from eagle_core.ttt_attention import ttt_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class TttOptions:
    """What of the training configuration the step itself needs."""

    ttt_length: int = 7
    step_decay: float = 0.8
    loss_positions: LossPositions = "predicted"
    loss_reduction: LossReduction = "tokens"
    objective: Objective = "cross_entropy"
    lk_eta: float = 3.0
    """How fast `lk_hybrid` turns from divergence to acceptance as acceptance grows."""
    compile: bool = False
    """Fuse the loss's element-wise work with torch.compile."""
    gradient_checkpointing: bool = False
    """Compute the feed-forward block again in the backward pass instead of keeping its insides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TttOutcome:
    """One step's loss, to be differentiated, and figures that are not."""

    loss: Tensor
    """Sum over steps of step_decay**i times the step's loss."""
    step_losses: Tensor
    """[L]"""
    step_correct: Tensor
    """[L] supervised positions where the draft's argmax is the target's"""
    step_supervised: Tensor
    """[L] supervised positions; targets outside the draft vocabulary are misses"""
    step_acceptance: Tensor
    """[L] sum over counted positions of sum(min(p, q))"""
    step_counted: Tensor
    """[L] counted positions"""
    step_prefix: Tensor
    """[L] positions supervised in step 0 where the draft is right in this step and all before it"""


class TttModule(nn.Module):
    """The step as a module whose forward pass DDP and FSDP2 can wrap."""

    def __init__(self, draft: DraftModel, options: TttOptions) -> None:
        super().__init__()
        self.draft = draft
        self.options = options

    def forward(
        self, batch: PackedBatch, target_head: Tensor, totals: Tensor | None = None
    ) -> TttOutcome:
        """Return `ttt_step`."""
        return ttt_step(self.draft, batch, target_head, self.options, totals=totals)


def loss_totals(t2d: Tensor, batch: PackedBatch, options: TttOptions) -> Tensor:
    """Return [L] what the losses of a batch are means over: positions, tokens or sequences.

    Summed over several batches and handed to `ttt_step`, the losses of these add up to that of one
    large batch.
    """
    return _active(t2d, batch, options).totals


def _active(t2d: Tensor, batch: PackedBatch, options: TttOptions) -> ActivePositions:
    return active_positions(
        loss_mask=batch.loss_mask,
        in_vocabulary=t2d[batch.target_argmax],
        starts=batch.starts,
        ttt_length=options.ttt_length,
        positions=options.loss_positions,
        reduction=options.loss_reduction,
    )


def ttt_step(
    draft: DraftModel,
    batch: PackedBatch,
    target_head: Tensor,
    options: TttOptions,
    *,
    totals: Tensor | None = None,
) -> TttOutcome:
    """Return the loss of `draft` on `batch`.

    Args:
        draft: the model to train.
        batch: packed sequences with the target's states.
        target_head: [D, Ht] the target's head rows of the draft vocabulary.
        options: lengths and reductions.
        totals: [L] what losses are divided by, if this is one of several batches of a step.

    """
    active = _active(draft.t2d, batch, options)
    share_of_step = active.weights(totals)
    rows, hidden = [], []
    for step, state in enumerate(_states(draft, batch, active, options)):
        indices = active.indices[step]
        counted = active.counted[step, indices]
        rows.append(indices[counted])
        hidden.append(state[counted])
    decay = options.step_decay ** torch.arange(options.ttt_length, device=share_of_step.device)
    weights = share_of_step * decay.unsqueeze(1)
    order = _RowOrder.of(rows, step_of_row=torch.arange(len(rows)))
    loss, outcome = distillation_loss(
        draft.norm(torch.cat(hidden))[order.rows].to(target_head.dtype),
        draft.lm_head.weight,
        weights[order.step, order.index],
        _teacher(draft, batch, target_head, order),
        objective=options.objective,
        lk_eta=options.lk_eta,
        compiled=options.compile,
    )
    return _outcome(loss, outcome, order, active, share_of_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class _RowOrder:
    """The loss rows of all steps, sorted by the token that teaches them."""

    rows: Tensor
    """[R] place of each in the concatenation of all steps"""
    step: Tensor
    """[R]"""
    index: Tensor
    """[R] index t in the packed batch"""

    @classmethod
    def of(cls, rows: list[Tensor], *, step_of_row: Tensor) -> "_RowOrder":
        index = torch.cat(rows)
        counts = torch.tensor([len(row) for row in rows])
        step = step_of_row.repeat_interleave(counts).to(index.device)
        order = torch.argsort(index + 1 + step, stable=True)
        return cls(rows=order, step=step[order], index=index[order])

    @property
    def teacher_token(self) -> Tensor:
        """[R] the token behind which the target's distribution is the teacher; non-decreasing."""
        return self.index + 1 + self.step


def _states(
    draft: DraftModel, batch: PackedBatch, active: ActivePositions, options: TttOptions
) -> Iterator[Tensor]:
    """Yield the pre-norm states [A_i, H] of each step."""
    layer, config = draft.midlayer, draft.config
    inputs = _InputHalves(draft, batch)
    fused = widened(draft.fuse(batch.aux_hidden_states))  # the residual stream stays wide
    position = _positions(batch)
    keys, values = inputs.keys_values(fused, torch.arange(batch.num_tokens - 1), step=0)
    cos, sin = (angle.to(keys.dtype).unsqueeze(1) for angle in rotary(position, config))
    keys = rotate(keys, cos[:-1], sin[:-1])
    own_keys: Tensor | None = None
    own_values: Tensor | None = None
    state, before = fused, torch.arange(batch.num_tokens, device=fused.device)
    for step, indices in enumerate(active.indices):
        kept = torch.searchsorted(before, indices)
        state, before = state[kept], indices
        angles = rotary(position[indices] + step, config)
        cos, sin = (angle.to(keys.dtype).unsqueeze(1) for angle in angles)
        query = rotate(inputs.queries(state, indices, step=step), cos, sin)
        if step:
            key, value = inputs.keys_values(state, indices, step=step)
            key, value = rotate(key, cos, sin).unsqueeze(1), value.unsqueeze(1)
            own_keys = key if own_keys is None else torch.cat([own_keys[kept], key], dim=1)
            own_values = (
                value if own_values is None else torch.cat([own_values[kept], value], dim=1)
            )
        mixed = _attend(batch.starts, indices, query, keys, values, own_keys, own_values)
        state = state + layer.self_attn.o_proj(mixed.flatten(1))
        if options.gradient_checkpointing:
            state = state + checkpoint(_feed_forward, layer, state, use_reentrant=False)
        else:
            state = state + _feed_forward(layer, state)
        yield state
        state = draft.recurrent(state)


def _feed_forward(layer: DraftLayer, state: Tensor) -> Tensor:
    output: Tensor = layer.mlp(layer.post_attention_layernorm(state))
    return output


class _InputHalves:
    """The two halves of the query, key and value projections: embeddings once, hidden each step."""

    def __init__(self, draft: DraftModel, batch: PackedBatch) -> None:
        layer, size = draft.midlayer, draft.config.hidden_size
        attention = layer.self_attn
        self._norm = layer.hidden_norm
        self._head_dim = draft.config.head_dim
        embedding = layer.input_layernorm(draft.embed_tokens(batch.input_ids))
        key_value = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
        self._query_hidden = attention.q_proj.weight[:, size:]
        self._key_value_hidden = key_value[:, size:]
        self._query_embedding = functional.linear(embedding, attention.q_proj.weight[:, :size])
        self._key_value_embedding = functional.linear(embedding, key_value[:, :size])

    def queries(self, state: Tensor, indices: Tensor, *, step: int) -> Tensor:
        """Return [A, N, E] for states [A, H] at `indices`."""
        hidden = functional.linear(self._norm(state), self._query_hidden)
        return self._split(hidden + self._query_embedding[indices + 1 + step])

    def keys_values(self, state: Tensor, indices: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [A, K, E] for states at `indices`."""
        hidden = functional.linear(self._norm(state[: len(indices)]), self._key_value_hidden)
        both = hidden + self._key_value_embedding[indices + 1 + step]
        key, value = both.chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def _split(self, states: Tensor) -> Tensor:
        return states.reshape(len(states), states.shape[-1] // self._head_dim, self._head_dim)


def _positions(batch: PackedBatch) -> Tensor:
    """[N] index of each token in its own sequence."""
    starts = torch.tensor(batch.starts, device=batch.input_ids.device)
    every = torch.arange(batch.num_tokens, device=starts.device)
    return every - starts[torch.searchsorted(starts, every, right=True) - 1]


def _attend(
    starts: tuple[int, ...],
    indices: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor | None,
    own_values: Tensor | None,
) -> Tensor:
    """Return [A, N, E], a sequence at a time; keys behind its last query are left out."""
    if own_keys is None or own_values is None:
        own_keys = own_values = keys.new_zeros(len(query), 0, *keys.shape[1:])
    borders = torch.searchsorted(indices, torch.tensor(starts, device=indices.device)).tolist()
    mixed = [query.new_zeros(0, *query.shape[1:])]
    for start, first, end in zip(starts, borders, borders[1:], strict=False):
        if first == end:
            continue
        members = slice(first, end)
        visible = slice(start, int(indices[end - 1]) + 1)
        mixed.append(
            ttt_attention(
                query[members],
                keys[visible],
                values[visible],
                own_keys[members],
                own_values[members],
                indices[members] - start,
            )
        )
    return torch.cat(mixed)


def _teacher(
    draft: DraftModel, batch: PackedBatch, target_head: Tensor, order: _RowOrder
) -> Teacher:
    tokens, token_of_row = torch.unique_consecutive(order.teacher_token, return_inverse=True)
    argmax = batch.target_argmax[tokens]
    draft_id = draft.t2d.cumsum(0)[argmax] - 1
    return Teacher(
        last_hidden_state=batch.last_hidden_state[tokens].to(target_head.dtype),
        head=target_head,
        logsumexp=batch.target_logsumexp[tokens],
        choice=torch.where(draft.t2d[argmax], draft_id, -1),
        token_of_row=token_of_row,
    )


def _outcome(
    loss: Tensor,
    outcome: RowOutcome,
    order: _RowOrder,
    active: ActivePositions,
    share_of_step: Tensor,
) -> TttOutcome:
    def per_step(values: Tensor) -> Tensor:
        total = share_of_step.new_zeros(len(active.indices))
        return total.index_add_(0, order.step, values.float())

    weights = share_of_step[order.step, order.index]
    return TttOutcome(
        loss=loss,
        step_losses=per_step(weights * outcome.cross_entropy),
        step_correct=per_step(outcome.correct),
        step_supervised=active.supervised.sum(dim=1),
        step_acceptance=per_step(outcome.acceptance),
        step_counted=active.counted.sum(dim=1),
        step_prefix=_prefix(outcome.correct, order, active),
    )


def _prefix(correct: Tensor, order: _RowOrder, active: ActivePositions) -> Tensor:
    right = torch.zeros_like(active.counted)
    right[order.step, order.index] = correct
    return right.cumprod(dim=0).sum(dim=1)
