"""The published EAGLE-3 training step in eager PyTorch, a peer of `eagle_core.training.ttt`.

As in SpecForge: every position computes queries, keys, values, MLP and logits in every step, hidden
states and embeddings are projected together, and the teacher's logits cover the full target
vocabulary. Where its versions and the authors' code differ, the faster variant is used: the
teacher's softmax is computed once, not in every step, and the loss keeps logits in the dtype of
computation and turns them into their gradient in the backward pass (a Triton kernel there,
whole-tensor operations here). Packed like ours instead of padded, with a mask that separates
sequences; positions and reduction of the loss are ours, so that gradients are the same.

Attention: "columns" is the way of both, a dense T x T product with the step-0 keys and one more
column per later step; "dense" multiplies with the keys of all steps under a T x (steps T) mask.

Shapes: N packed tokens, V target vocabulary, D draft vocabulary, H hidden, E head size.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.eyas_step import new_draft, options, packed_batch
from benchmarks.step_case import StepCase, whole_target_head
from benchmarks.step_worker import Peer, serve
from eagle_core.draft.model import DraftModel
from eagle_core.draft.rotary import rotary, rotate
from eagle_core.training.config import TttConfig
from eagle_core.training.packing import PackedBatch

Attention = Literal["columns", "dense"]


def plain_loss(
    draft: DraftModel,
    batch: PackedBatch,
    target_lm_head: Tensor,
    settings: TttConfig,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """Return the loss and [L] correct predictions; reduction is "tokens", positions "predicted".

    Args:
        draft: the model to train.
        batch: packed sequences.
        target_lm_head: [V, H] the target's whole head.
        settings: length and decay.
        attention: see the module.

    """
    sequence, position = _places(batch)
    layer = _Layer(draft, sequence, position, attention)
    hidden = draft.fc(batch.aux_hidden_states)
    probability, draft_argmax, known = _teacher(draft, batch, target_lm_head, settings.ttt_length)
    ids = batch.input_ids
    total, correct = hidden.new_zeros(()), []
    for step in range(settings.ttt_length):
        ids, now = _moved(ids), slice(step + 1, step + 1 + batch.num_tokens)
        hidden = layer(ids, hidden, step)
        counted = _ahead(batch.loss_mask, sequence, step + 2) & known[now]
        logits = draft.logits(hidden)
        correct.append(((logits.argmax(dim=-1) == draft_argmax[now]) & counted).sum())
        cross_entropy = _CrossEntropy.apply(logits, probability[now])  # type: ignore[no-untyped-call]  # torch
        loss = (cross_entropy * counted).sum() / counted.sum().clamp(min=1)
        total = total + settings.step_decay**step * loss
    return total, torch.stack(correct)


@torch.no_grad()
def _teacher(
    draft: DraftModel, batch: PackedBatch, target_lm_head: Tensor, ttt_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the target's predictions after each token, padded by L zeros.

    [N + L, D] probabilities, [N + L] their draft argmax, [N + L] whether it is the target's.
    """
    logits = functional.linear(batch.last_hidden_state, target_lm_head)
    known = draft.t2d[logits.argmax(dim=-1)]
    probability = logits[:, draft.t2d].float().softmax(dim=-1)
    draft_argmax = probability.argmax(dim=-1)
    return (
        functional.pad(probability, (0, 0, 0, ttt_length)),
        functional.pad(draft_argmax, (0, ttt_length)),
        functional.pad(known, (0, ttt_length)),
    )


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy [N] of logits [N, D] under probabilities [N, D]; overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probability: Tensor) -> Tensor:  # noqa: ANN401
        wide = logits.float()
        logsumexp = wide.logsumexp(dim=-1)
        ctx.save_for_backward(logits, probability, logsumexp)
        cross_entropy: Tensor = logsumexp - torch.linalg.vecdot(probability, wide)
        return cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        logits, probability, logsumexp = ctx.saved_tensors
        slope = logits.float().sub_(logsumexp.unsqueeze(-1)).exp_().sub_(probability)
        logits.copy_(slope.mul_(grads[0].unsqueeze(-1)))
        return logits, None


class _Layer:
    """The decoder layer over all positions, with the keys of the steps so far."""

    def __init__(
        self, draft: DraftModel, sequence: Tensor, position: Tensor, attention: Attention
    ) -> None:
        self._draft, self._position, self._attention = draft, position, attention
        same = sequence.unsqueeze(1) == sequence.unsqueeze(0)
        self._visible = same.tril()
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, ids: Tensor, hidden: Tensor, step: int) -> Tensor:
        """Return the pre-norm state [N, H]."""
        layer, config = self._draft.midlayer, self._draft.config
        embedding = layer.input_layernorm(self._draft.embed_tokens(ids))
        inputs = torch.cat([embedding, layer.hidden_norm(hidden)], dim=-1)
        cos, sin = rotary(self._position + step, config)
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
            for projection in (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
            )
        )  # [N heads or K key-value heads, N tokens, E]
        repeat = config.num_attention_heads // config.num_key_value_heads
        self._keys.append(rotate(key, cos, sin).repeat_interleave(repeat, dim=0))
        self._values.append(value.repeat_interleave(repeat, dim=0))
        query = rotate(query, cos, sin) * config.head_dim**-0.5
        attention_output = (
            self._columns(query) if self._attention == "columns" else self._dense(query)
        )
        hidden = hidden + layer.self_attn.o_proj(attention_output.transpose(0, 1).flatten(1))
        output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return output

    def _columns(self, query: Tensor) -> Tensor:
        num_tokens = query.shape[1]
        scores = query @ self._keys[0].transpose(1, 2)
        scores = scores.masked_fill(~self._visible, float("-inf"))
        own = [(query * key).sum(dim=-1, keepdim=True) for key in self._keys[1:]]
        weights = torch.cat([scores, *own], dim=-1).softmax(dim=-1)
        attention_output = weights[..., :num_tokens] @ self._values[0]
        for step, value in enumerate(self._values[1:]):
            attention_output = attention_output + weights[..., num_tokens + step, None] * value
        return attention_output

    def _dense(self, query: Tensor) -> Tensor:
        own = torch.eye(query.shape[1], dtype=torch.bool, device=query.device)
        visible = torch.cat([self._visible, *([own] * (len(self._keys) - 1))], dim=1)
        scores = query @ torch.cat(self._keys, dim=1).transpose(1, 2)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return weights @ torch.cat(self._values, dim=1)


def _places(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Return [N] the number of each token's sequence, and [N] its index in it."""
    starts = torch.tensor(batch.starts, device=batch.input_ids.device)
    every = torch.arange(batch.num_tokens, device=starts.device)
    sequence = torch.searchsorted(starts, every, right=True) - 1
    return sequence, every - starts[sequence]


def _moved(values: Tensor) -> Tensor:
    """Return values shifted left by one, zero at the end; a copy, as in both."""
    return torch.cat([values[1:], torch.zeros_like(values[:1])])


def _ahead(mask: Tensor, sequence: Tensor, by: int) -> Tensor:
    """Return [N] the mask `by` tokens later, False beyond the sequence."""
    ahead = torch.zeros_like(mask)
    if by < len(mask):
        inside = sequence[by:] == sequence[: len(mask) - by]
        ahead[: len(mask) - by] = mask[by:] & inside
    return ahead


def load(case: StepCase, variant: str) -> Peer:
    """Return the plain step as a peer; `variant` is the kind of attention."""
    device = torch.device(case.device)
    draft = new_draft(case.shape).to(device)
    head = whole_target_head(case.shape).to(device)
    attention: Attention = "dense" if variant == "dense" else "columns"

    def prepare(wanted: StepCase) -> Callable[[], Tensor]:
        batch = packed_batch(wanted).to(device)
        return lambda: plain_loss(draft, batch, head, options(wanted), attention)[0]

    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    return Peer(
        trained=trained,
        optimizer=torch.optim.AdamW(trained),
        fusion=draft.get_parameter("fc.weight"),
        prepare=prepare,
    )


if __name__ == "__main__":
    serve(load)
