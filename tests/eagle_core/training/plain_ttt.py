"""The published training-time-test step, plainly: dense attention, every position, full head.

Slow and readable; what `eagle_core.training.ttt` must equal. One sequence at a time, any dtype.
"""

import torch
from torch import Tensor

from eagle_core.draft.model import DraftModel
from eagle_core.draft.rotary import rotary, rotate
from eagle_core.training.config import TttConfig
from eagle_core.training.packing import PackedBatch


def plain_loss(
    draft: DraftModel, batch: PackedBatch, target_lm_head: Tensor, options: TttConfig
) -> Tensor:
    """Return the loss of a packed batch: step by step, over whole sequences."""
    total = batch.last_hidden_state.new_zeros(())
    sequences = [
        _sequence(draft, batch, start, end, target_lm_head, options)
        for start, end in zip(batch.starts, batch.starts[1:], strict=False)
    ]
    for step in range(options.ttt_length):
        losses = [sequence[step][0] for sequence in sequences]
        counts = [sequence[step][1] for sequence in sequences]
        num_counted = sum(int(count) for count in counts)
        if options.loss_reduction == "positions":
            loss = torch.stack(losses).sum() / batch.num_tokens
        elif options.loss_reduction == "tokens":
            loss = torch.stack(losses).sum() / max(num_counted, 1)
        else:
            means = [
                loss / count for loss, count in zip(losses, counts, strict=True) if int(count) > 0
            ]
            loss = torch.stack(means).mean() if means else losses[0] * 0
        total = total + options.step_decay**step * loss
    return total


def _sequence(
    draft: DraftModel,
    batch: PackedBatch,
    start: int,
    end: int,
    target_lm_head: Tensor,
    options: TttConfig,
) -> list[tuple[Tensor, Tensor]]:
    """Return (summed cross-entropy, number of counted positions) of each step."""
    ids = batch.input_ids[start:end]
    mask = batch.loss_mask[start:end].clone()
    if options.loss_positions == "eagle3":
        mask[-1] = False
    logits = batch.last_hidden_state[start:end] @ target_lm_head.T
    length = end - start
    aux = batch.aux_hidden_states[start:end]
    if draft.config.norm_before_fc:
        aux = _rms_norm(aux, draft.input_norm.weight, draft.config.rms_norm_eps)
    if draft.config.fc_norm:
        parts = zip(draft.fc_norm, aux.chunk(3, dim=-1), strict=True)
        aux = torch.cat([norm(part) for norm, part in parts], dim=-1)
    hidden = draft.fc(aux)
    caches: list[tuple[list[Tensor], list[Tensor]]] = [
        ([], []) for _ in range(draft.config.num_hidden_layers)
    ]
    results = []
    for step in range(options.ttt_length):
        shifted_ids = _shift(ids, 1 + step)
        for number, cache in enumerate(caches):
            hidden = plain_layer(draft, number, shifted_ids, hidden, step, *cache)
        normed = draft.norm(hidden)
        log_q = draft.lm_head(normed).log_softmax(dim=-1)
        hidden = normed if draft.config.norm_output else hidden
        teacher = _shift(logits, 1 + step)
        p = teacher[:, draft.t2d].softmax(dim=-1)
        ahead = step if options.loss_positions == "eagle3" else step + 2
        counted = _shift(mask, ahead) & draft.t2d[teacher.argmax(dim=-1)]
        counted &= torch.arange(length) + 1 + step < length
        of_all = teacher.softmax(dim=-1)[:, draft.t2d]
        losses = _objective(options, p, of_all, log_q)
        results.append(((losses * counted).sum(), counted.sum()))
    return results


def _objective(options: TttConfig, p: Tensor, of_all: Tensor, log_q: Tensor) -> Tensor:
    """Return the loss of each position, for autograd to differentiate."""
    cross_entropy = -(p * log_q).sum(dim=-1)
    acceptance = torch.minimum(of_all, log_q.exp()).sum(dim=-1)
    if options.objective == "lk_alpha":
        return -acceptance.log()
    if options.objective == "lk_hybrid":
        kept = torch.exp(-options.lk_eta * acceptance).detach()
        return kept * cross_entropy + (1 - kept) * (1 - acceptance)
    return cross_entropy


def plain_layer(
    draft: DraftModel,
    number: int,
    ids: Tensor,
    hidden: Tensor,
    step: int,
    all_keys: list[Tensor],
    all_values: list[Tensor],
) -> Tensor:
    """Return the states [T, H] of one layer; its keys and values are added to the lists."""
    config = draft.config
    layer = draft.layers[str(number)] if number else draft.midlayer
    attention, length = layer.self_attn, len(ids)
    if number:
        inputs = layer.input_layernorm(hidden)
    else:
        normed = layer.hidden_norm(hidden)
        inputs = torch.cat([layer.input_layernorm(draft.embed_tokens(ids)), normed], dim=-1)
        hidden = normed if config.norm_before_residual else hidden
    cos, sin = rotary(torch.arange(length) + step, config)
    cos, sin = cos.to(hidden.dtype), sin.to(hidden.dtype)
    heads = (length, -1, config.head_dim)
    query = attention.q_proj(inputs).view(heads).transpose(0, 1)
    key = attention.k_proj(inputs).view(heads).transpose(0, 1)
    if config.qk_norm:
        query = _rms_norm(query, attention.q_norm.weight, config.rms_norm_eps)
        key = _rms_norm(key, attention.k_norm.weight, config.rms_norm_eps)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    value = attention.v_proj(inputs).view(heads).transpose(0, 1)
    repeat = config.num_attention_heads // config.num_key_value_heads
    all_keys.append(key.repeat_interleave(repeat, dim=0))
    all_values.append(value.repeat_interleave(repeat, dim=0))
    scores = query @ torch.cat(all_keys, dim=1).transpose(1, 2) * config.head_dim**-0.5
    visible = _visible(length, step, config.sliding_window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    mixed = (weights @ torch.cat(all_values, dim=1)).transpose(0, 1).reshape(length, -1)
    hidden = hidden + attention.o_proj(mixed)
    output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output


def _visible(length: int, step: int, window: int | None) -> Tensor:
    """Return [T, T * (step + 1)] which keys of step 0, of step 1, and so on, a query sees.

    Row t of step i stands at position t + i, key j of step k at position j + k.
    """
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = torch.eye(length, dtype=torch.bool)
    visible = torch.cat([causal, *([own] * step)], dim=1)
    if window is None:
        return visible
    at = torch.cat([torch.arange(length) + earlier for earlier in range(step + 1)])
    return visible & (at > torch.arange(length).unsqueeze(1) + step - window)


def _rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states * (states.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight


def _shift(values: Tensor, by: int) -> Tensor:
    """Return values moved `by` places to the front, zeros behind."""
    moved = torch.zeros_like(values)
    if by < len(values):
        moved[: len(values) - by] = values[by:]
    return moved
