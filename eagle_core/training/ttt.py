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

import torch
from torch import Tensor, nn

from eagle_core.bfloat16 import widened
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.draft.rotary import rotary
from eagle_core.training.config import TttConfig
from eagle_core.training.layer_steps import LayerSteps, Rows
from eagle_core.training.loss import RowOutcome, Teacher, distillation_loss
from eagle_core.training.packing import PackedBatch
from eagle_core.training.positions import (
    TttPositions,
    ttt_positions,
)


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

    `on_attended` gets what the first layer's feed-forward block reads: the state [A_i, H] after
    attention.
    """
    fused = draft.fuse(widened(batch.aux_hidden_states))
    embedding: Tensor | None = draft.embed_tokens(batch.input_ids)
    layers: list[LayerSteps] = []
    for layer in draft.every_layer():
        layers.append(
            LayerSteps(
                layer,
                embedding,
                fused.dtype,  # of products; autocast would round an input of two products twice
                checkpointed=options.gradient_checkpointing,
                fused=fuses_attention(options, fused.device),
            )
        )
        embedding = None  # of the first layer only
    state = widened(fused)[:-1]  # the residual stream stays wide; the last token has no next one
    position = _positions(batch)
    before = torch.arange(len(state), device=state.device)
    for step, indices in enumerate(positions.indices):
        kept = torch.searchsorted(before, indices)
        rows = _rows(before if step == 0 else indices, position, step, draft.config, fused.dtype)
        state = state[kept] if step else state
        for number, one in enumerate(layers):
            if step:
                output = one.advance(state, rows, kept)
            else:
                output = one.begin(state, rows, kept if one is layers[-1] else None)
            state = output.state
            if number == 0:
                is_partial = step > 0 or one is layers[-1]
                on_attended(output.attended if is_partial else output.attended[kept])
        yield state
        state, before = draft.recurrent(state), indices


def _rows(
    indices: Tensor, position: Tensor, step: int, config: DraftConfig, dtype: torch.dtype
) -> Rows:
    angles = rotary(position[indices] + step, config)
    cos, sin = (angle.to(dtype).unsqueeze(1) for angle in angles)
    return Rows(step=step, indices=indices, first=indices - position[indices], cos=cos, sin=sin)


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
