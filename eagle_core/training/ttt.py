"""The training-time-test step of EAGLE-3 (arXiv 2503.01840): only the work that gradients need.

At index t of step i the draft reads the embedding of token t+1+i and its own hidden state, and
learns the target's distribution after token t+1+i; the rotary position is t+i. Savings over the
plain formulation (docs/design.md, section 5): prompt positions give only step-0 keys and values;
the embedding half of the projections and the teacher are computed once per token; logits exist for
one chunk of rows at a time.

Shapes: N packed tokens, A_i indices of step i, H draft hidden, L steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from eagle_core.bfloat16 import widened
from eagle_core.draft.model import DraftLayer, DraftModel, gated, rotary, rotate
from eagle_core.training.attention import packed_ttt_attention
from eagle_core.training.config import TttConfig
from eagle_core.training.flex_attention import flex_ttt_attention
from eagle_core.training.loss import RowOutcome, Teacher, distillation_loss
from eagle_core.training.packing import PackedBatch
from eagle_core.training.positions import (
    TttPositions,
    ttt_positions,
)
from eagle_core.training.repeated_linear import RepeatedLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class TttOutcome:
    """The loss of one step, which carries gradients, and metrics, which do not."""

    loss: Tensor
    """Sum over steps of step_decay**i times the step's loss."""
    step_losses: Tensor
    """[L]"""
    step_correct: Tensor
    """[L] supervised positions where the draft's argmax is the target's"""
    step_supervised: Tensor
    """[L] supervised positions; targets outside the draft vocabulary are misses"""
    step_acceptance: Tensor
    """[L] sum over counted positions of sum(min(p, q)); NaN where `RowOutcome` has NaN"""
    step_counted: Tensor
    """[L] counted positions"""
    step_prefix: Tensor
    """[L] positions supervised in step 0 where this and all earlier steps are correct"""


class TttModule(nn.Module):
    """The step as a module whose forward pass DDP and FSDP2 can wrap."""

    def __init__(self, draft: DraftModel, options: TttConfig) -> None:
        super().__init__()
        self.draft = draft
        self.options = options

    def forward(
        self, batch: PackedBatch, target_head: Tensor, totals: Tensor | None = None
    ) -> TttOutcome:
        """Return `ttt_step`."""
        return ttt_step(self.draft, batch, target_head, self.options, totals=totals)


def fuses_attention(options: TttConfig, device: torch.device) -> bool:
    """Return whether to use FlexAttention: it needs a compiler and has no backward on a CPU."""
    return options.compile and device.type == "cuda"


def loss_totals(t2d: Tensor, batch: PackedBatch, options: TttConfig) -> Tensor:
    """Return [L] the divisors of a batch's losses: number of positions, tokens or sequences.

    If `ttt_step` gets their sum over several batches, the losses of the batches add up to that of
    one large batch.
    """
    return batch_positions(t2d, batch, options).totals


def batch_positions(t2d: Tensor, batch: PackedBatch, options: TttConfig) -> TttPositions:
    """Return where each step computes and counts, for the draft vocabulary `t2d` [V]."""
    return ttt_positions(
        loss_mask=batch.loss_mask,
        in_vocabulary=t2d[batch.target_argmax],
        starts=batch.starts,
        ttt_length=options.ttt_length,
        positions=options.loss_positions,
        reduction=options.loss_reduction,
        draws=batch.draws,
        limit=options.max_positions_per_sample,
    )


def ttt_step(
    draft: DraftModel,
    batch: PackedBatch,
    target_head: Tensor,
    options: TttConfig,
    *,
    totals: Tensor | None = None,
) -> TttOutcome:
    """Return the loss of `draft` on `batch`.

    Args:
        draft: the model to train.
        batch: packed sequences with the target's states.
        target_head: [D, Ht] the target's head rows of the draft vocabulary.
        options: settings of the step.
        totals: [L] divisors of the losses, if this is one of several batches of a step.

    """
    positions = batch_positions(draft.t2d, batch, options)
    share_of_step = positions.weights(totals)
    rows, hidden = [], []
    for step, state in enumerate(chain_states(draft, batch, positions, options)):
        indices = positions.indices[step]
        counted = positions.counted[step, indices]
        rows.append(indices[counted])
        hidden.append(draft.norm(state[counted]).to(target_head.dtype))
    decay = options.step_decay ** torch.arange(options.ttt_length, device=share_of_step.device)
    weights = share_of_step * decay.unsqueeze(1)
    order = _RowOrder.of(rows, step_of_row=torch.arange(len(rows)))
    loss, outcome = distillation_loss(
        torch.cat(hidden)[order.rows],
        draft.lm_head.weight,
        weights[order.step, order.index],
        _teacher(draft, batch, target_head, order),
        objective=options.objective,
        lk_eta=options.lk_eta,
        compiled=options.compile,
    )
    return _outcome(loss, outcome, order, positions, share_of_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class _RowOrder:
    """The loss rows of all steps, sorted by teacher token."""

    rows: Tensor
    """[R] index of each row in the concatenation of all steps"""
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
        """[R] the token after which the target's distribution is the teacher; non-decreasing."""
        return self.index + 1 + self.step


def chain_states(
    draft: DraftModel,
    batch: PackedBatch,
    positions: TttPositions,
    options: TttConfig,
    *,
    on_attended: Callable[[Tensor], None] = lambda _state: None,
) -> Iterator[Tensor]:
    """Yield the pre-norm states [A_i, H] of each step.

    `on_attended` gets what the feed-forward block reads: the state [A_i, H] after attention.
    """
    layer, config = draft.midlayer, draft.config
    fused = draft.fuse(widened(batch.aux_hidden_states))
    dtype = fused.dtype  # of products; autocast would round an input of two products twice
    inputs = _InputHalves(draft, batch, dtype)
    output = RepeatedLinear(layer.self_attn.o_proj.weight, dtype)
    feed_forward = _feed_forward(layer, dtype, checkpointed=options.gradient_checkpointing)
    state = widened(fused)  # the residual stream stays wide
    normed = layer.hidden_norm(state).to(dtype)
    position = _positions(batch)
    every = torch.arange(batch.num_tokens, device=state.device)
    keys, values = inputs.keys_values(normed[:-1], every[:-1], step=0)
    cos, sin = (angle.to(keys.dtype).unsqueeze(1) for angle in rotary(position, config))
    keys = rotate(keys, cos[:-1], sin[:-1])
    own_keys = own_values = keys.new_zeros(batch.num_tokens, 0, *keys.shape[1:])
    before, is_fused = every, fuses_attention(options, state.device)
    for step, indices in enumerate(positions.indices):
        kept = torch.searchsorted(before, indices)
        state, before = state[kept], indices
        normed = layer.hidden_norm(state).to(dtype) if step else normed[kept]
        angles = rotary(position[indices] + step, config)
        cos, sin = (angle.to(keys.dtype).unsqueeze(1) for angle in angles)
        query = rotate(inputs.queries(normed, indices, step=step), cos, sin)
        own_keys, own_values = own_keys[kept], own_values[kept]
        if step:
            key, value = inputs.keys_values(normed, indices, step=step)
            key, value = rotate(key, cos, sin).unsqueeze(1), value.unsqueeze(1)
            own_keys = torch.cat([own_keys, key], dim=1)
            own_values = torch.cat([own_values, value], dim=1)
        attend = flex_ttt_attention if is_fused else packed_ttt_attention
        first = indices - position[indices]
        attention_output = attend(query, keys, values, own_keys, own_values, indices, first)
        state = state + output(attention_output.flatten(1))
        on_attended(state)
        state = state + feed_forward(state)
        yield state
        state = draft.recurrent(state)


def _feed_forward(
    layer: DraftLayer, dtype: torch.dtype, *, checkpointed: bool
) -> Callable[[Tensor], Tensor]:
    """Return the feed-forward block for all steps: [A, H] to [A, H]."""
    block = layer.mlp

    def normed(state: Tensor) -> Tensor:
        output: Tensor = layer.post_attention_layernorm(state)
        return output.to(dtype)

    if checkpointed:  # RepeatedLinear would keep recomputed inputs until the last backward
        return partial(checkpoint, lambda state: block(normed(state)), use_reentrant=False)
    gate, up, down = (
        RepeatedLinear(part.weight, dtype)
        for part in (block.gate_proj, block.up_proj, block.down_proj)
    )
    return lambda state: gated(normed(state), gate=gate, up=up, down=down)


class _InputHalves:
    """Halves of the query, key and value projections: embedding once, hidden state each step."""

    def __init__(self, draft: DraftModel, batch: PackedBatch, dtype: torch.dtype) -> None:
        layer, size = draft.midlayer, draft.config.hidden_size
        attention = layer.self_attn
        self._head_dim = draft.config.head_dim
        embedding = layer.input_layernorm(draft.embed_tokens(batch.input_ids))
        key_value = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
        self._query_hidden = RepeatedLinear(attention.q_proj.weight[:, size:], dtype)
        self._key_value_hidden = RepeatedLinear(key_value[:, size:], dtype)
        self._query_embedding = functional.linear(embedding, attention.q_proj.weight[:, :size])
        self._key_value_embedding = functional.linear(embedding, key_value[:, :size])

    def queries(self, normed: Tensor, indices: Tensor, *, step: int) -> Tensor:
        """Return [A, N, E] for normed states [A, H] at `indices`."""
        hidden = self._query_hidden(normed)
        return self._split(hidden + self._query_embedding[indices + 1 + step])

    def keys_values(self, normed: Tensor, indices: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [A, K, E] for normed states at `indices`."""
        hidden = self._key_value_hidden(normed)
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
        draft_argmax=torch.where(draft.t2d[argmax], draft_id, -1),
        token_of_row=token_of_row,
    )


def _outcome(
    loss: Tensor,
    outcome: RowOutcome,
    order: _RowOrder,
    positions: TttPositions,
    share_of_step: Tensor,
) -> TttOutcome:
    def per_step(values: Tensor) -> Tensor:
        total = share_of_step.new_zeros(len(positions.indices))
        return total.index_add_(0, order.step, values.float())

    weights = share_of_step[order.step, order.index]
    return TttOutcome(
        loss=loss,
        step_losses=per_step(weights * outcome.cross_entropy),
        step_correct=per_step(outcome.correct),
        step_supervised=positions.supervised.sum(dim=1),
        step_acceptance=per_step(outcome.acceptance),
        step_counted=positions.counted.sum(dim=1),
        step_prefix=_prefix(outcome.correct, order, positions),
    )


def _prefix(correct: Tensor, order: _RowOrder, positions: TttPositions) -> Tensor:
    is_correct = torch.zeros_like(positions.counted)
    is_correct[order.step, order.index] = correct
    return is_correct.cumprod(dim=0).sum(dim=1)
