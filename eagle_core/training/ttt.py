"""The training-time-test step of EAGLE-3 (arXiv 2503.01840): only the work that gradients need.

At index t of step i the draft reads the embedding of token t+1+i and its own hidden state, and
learns the target's distribution after token t+1+i; the rotary position is t+i. Savings over the
plain formulation (docs/design.md, section 5): prompt positions give only step-0 keys and values;
the embedding half of the projections and the teacher are computed once per token; logits exist for
one chunk of rows at a time.

Shapes: N packed tokens, A_i indices of step i, H draft hidden, L steps.
"""

import dataclasses
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
from eagle_core.training.positions import TttPositions
from eagle_core.training.step_plan import HostRows, LossRows, StepPlan, plan_step


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
    return batch_plan(t2d, batch, options).positions.totals


def with_plan(batch: PackedBatch, t2d: Tensor, options: TttConfig) -> PackedBatch:
    """Return the batch with its plan, in pinned memory if the batch is; all is on the CPU."""
    plan = batch_plan(t2d, batch, options)
    plan = plan.pinned() if batch.input_ids.is_pinned() else plan
    return dataclasses.replace(batch, plan=plan)


def batch_plan(t2d: Tensor, batch: PackedBatch, options: TttConfig) -> StepPlan:
    """Return where each step computes and counts, for the draft vocabulary `t2d` [V].

    That is the batch's own plan, if it has one.
    """
    if batch.plan is not None:
        return batch.plan
    plan = plan_step(
        loss_mask=batch.loss_mask.cpu(),
        in_vocabulary=t2d[batch.target_argmax].cpu(),
        starts=batch.starts,
        options=options,
        own=batch.own,
        position_weights=None if batch.position_weights is None else batch.position_weights.cpu(),
    )
    return plan.to(batch.input_ids.device)


def batch_positions(t2d: Tensor, batch: PackedBatch, options: TttConfig) -> TttPositions:
    """Return the positions of `batch_plan`."""
    return batch_plan(t2d, batch, options).positions


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
    plan = batch_plan(draft.t2d, batch, options)
    positions, order = plan.positions, plan.loss
    share_of_step = positions.weights(totals)
    hidden = [
        draft.norm(state[plan.counted[step]]).to(target_head.dtype)
        for step, state in enumerate(chain_states(draft, batch, plan, options))
    ]
    decay = options.step_decay ** torch.arange(options.ttt_length, device=share_of_step.device)
    weights = share_of_step * decay.unsqueeze(1)
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


def chain_states(
    draft: DraftModel,
    batch: PackedBatch,
    plan: StepPlan,
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
    every = torch.arange(len(state), device=state.device)
    for step, indices in enumerate(plan.positions.indices):
        kept = plan.kept[step]
        computed, host = (indices, plan.by_step[step]) if step else (every, plan.every)
        rows = _rows(computed, host, plan, step, draft.config, fused.dtype)
        state = state[kept] if step else state
        for number, one in enumerate(layers):
            if step:
                output = one.advance(state, rows, kept)
            else:
                is_last = one is layers[-1]
                output = one.begin(state, rows, kept if is_last else None, plan.by_step[0])
            state = output.state
            if number == 0:
                is_partial = step > 0 or one is layers[-1]
                on_attended(output.attended if is_partial else output.attended[kept])
        yield state
        state = draft.recurrent(state)


def _rows(
    indices: Tensor,
    host: HostRows,
    plan: StepPlan,
    step: int,
    config: DraftConfig,
    dtype: torch.dtype,
) -> Rows:
    position = plan.position[indices]
    angles = rotary(position + step, config)
    cos, sin = (angle.to(dtype).unsqueeze(1) for angle in angles)
    return Rows(step=step, indices=indices, first=indices - position, cos=cos, sin=sin, host=host)


def _teacher(
    draft: DraftModel, batch: PackedBatch, target_head: Tensor, order: LossRows
) -> Teacher:
    argmax = batch.target_argmax[order.tokens]
    draft_id = draft.t2d.cumsum(0)[argmax] - 1
    return Teacher(
        last_hidden_state=batch.last_hidden_state[order.tokens].to(target_head.dtype),
        head=target_head,
        logsumexp=batch.target_logsumexp[order.tokens],
        draft_argmax=torch.where(draft.t2d[argmax], draft_id, -1),
        token_of_row=order.token_of_row,
        rows_of_token=order.rows_of_token,
    )


def _outcome(
    loss: Tensor,
    outcome: RowOutcome,
    order: LossRows,
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


def _prefix(correct: Tensor, order: LossRows, positions: TttPositions) -> Tensor:
    is_correct = torch.zeros_like(positions.counted)
    is_correct[order.step, order.index] = correct
    return is_correct.cumprod(dim=0).sum(dim=1)
