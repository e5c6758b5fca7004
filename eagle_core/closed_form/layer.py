"""Write a linear recurrence into a draft, so that the network computes it (docs/closed-form.md).

Two channels of the residual stream are taken from the prediction: those that the head reads least.
One holds a large constant, so that every norm divides all positions alike. One is a flag: set in
the fused state, and cleared by step 0.

Embeddings come in by attention. In a group of query heads one attends to its own position only: its
queries and keys see nothing but the constant, and rotate with the position. Its values are the
directions of the embedding that matter most. They are written into the directions of the stream
where predictions are smallest, so that the feed-forward block can tell both apart.

The maps are units of the feed-forward block whose gates see only constant and flag, so that they
are linear: some at step 0, others later. With s the stream after attention, Q the directions that
hold the embedding's part, and the rest P = 1 - Q Q^T of the stream:

    step 0:  x = P s + E' Q^T s       later:  x = M P s + N' Q^T s

The remaining units keep random weights; their part is solved later (`feed_forward`).

Further layers begin as the identity: their output projections are zero. Biases are zero, too.

Shapes: H draft hidden, I intermediate size, E head size, K key-value heads, r kept directions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eagle_core.closed_form.recurrence import Recurrence
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftLayer, DraftModel
from eagle_core.draft.rotary import frequencies
from eagle_core.errors import ConfigError

_CONSTANT = 10.0
"""The constant / the 2-norm of the other channels."""
_FLAG = 1.0
"""The flag / that 2-norm."""
_GATE = 4.0
"""What an open gate of a linear unit sees."""
_UNIT_INPUT = 0.1
"""Size of the feed-forward block's inputs. Adam moves all weights alike, so the smaller the inputs,
the larger the weights, and the less a step changes the function."""
_PAIRS = 6
"""Rotary pairs, the fastest ones, by which a head finds its own position."""
_NATS = 12.0
"""By how much the score of any other position is lower, at least."""
_DISTANCES = 4096
"""Up to this distance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """The channels of the residual stream that hold no prediction."""

    constant: int
    flag: int

    @classmethod
    def of(cls, draft: DraftModel, gain: Tensor) -> "Channels":
        """Return those that the head reads least, for states of size 1 before `gain` [H]."""
        read = draft.lm_head.weight.square().sum(dim=0) * gain.square()
        constant, flag = read.argsort()[:2].tolist()
        return cls(constant=constant, flag=flag)

    def without(self, maps: Tensor) -> Tensor:
        """Return maps [..., H, X] with the rows of the two channels zero."""
        kept = maps.clone()
        kept[..., [self.constant, self.flag], :] = 0
        return kept


@torch.no_grad()
def write_recurrence(
    draft: DraftModel, found: Recurrence, *, gain: Tensor, channels: Channels
) -> None:
    """Write `found` into `draft`, whose other weights are random.

    Args:
        draft: initialised, with `aux_scale` set.
        found: the maps; what they predict for `channels` is not used.
        gain: [H] of the target's final norm.
        channels: which hold the constant and the flag.

    """
    config, layer = draft.config, draft.midlayer
    one = 1 / math.sqrt(config.hidden_size)
    ones = torch.ones_like(gain)
    _write_norm(layer.hidden_norm, ones, channels)
    _write_norm(layer.post_attention_layernorm, ones * _UNIT_INPUT, channels)
    _write_norm(draft.norm, ones if config.norm_output else gain, channels)
    for further in list(draft.every_layer())[1:]:
        _write_identity(further, channels)
    taken = [channels.constant, channels.flag]
    draft.norm.weight[channels.flag] = one  # it is cleared, and stays so
    if config.target_head:  # which is frozen: the norm hides from it what is no prediction
        draft.norm.weight[taken] = 0
    else:
        draft.lm_head.weight[:, taken] = 0
    if config.norm_output:  # the next step reads the norm's output: the gain is the head's
        draft.norm.weight[channels.constant] = _CONSTANT
        draft.lm_head.weight.mul_(gain)
    rank = min(config.hidden_size // 2, config.intermediate_size // 2)
    if rank < 2:
        raise ConfigError("the draft is too small to hold a linear recurrence")
    parts = _Parts.of(found, channels, rank=min(rank, _own_heads(config) * config.head_dim))
    draft.fc.weight.copy_(parts.fusing)
    constant = found.constant.to(draft.fc.weight) / one
    draft.fc.weight[channels.constant] = constant * _CONSTANT
    draft.fc.weight[channels.flag] = constant * _FLAG
    _write_attention(draft, parts, channels)
    _write_units(draft, parts, channels, flag=_FLAG / one)


def _write_norm(norm: nn.RMSNorm, weight: Tensor, channels: Channels) -> None:
    """Let a norm multiply the stream's prediction by `weight` [H], whatever its size."""
    one = 1 / math.sqrt(len(weight))
    norm.weight.copy_(weight * _CONSTANT)  # by which the constant makes it divide
    norm.weight[channels.constant] = one
    norm.weight[channels.flag] = one * _CONSTANT / _FLAG


def _write_identity(layer: DraftLayer, channels: Channels) -> None:
    """Let a further layer add nothing; what its parts read has a size that can be trained."""
    ones = torch.ones_like(layer.input_layernorm.weight)
    _write_norm(layer.input_layernorm, ones, channels)
    _write_norm(layer.post_attention_layernorm, ones * _UNIT_INPUT, channels)
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Parts:
    """The recurrence as the network holds it; nothing is in the two channels."""

    fusing: Tensor
    """[H, 3Ht]"""
    values: Tensor
    """[r, H] of the embedding; their size is 1"""
    directions: Tensor
    """Q [H, r] orthonormal"""
    first: Tensor
    """[H, r] what step 0 adds for Q^T s"""
    later: Tensor
    """[H, H] what later steps add for s"""

    @classmethod
    def of(cls, found: Recurrence, channels: Channels, *, rank: int) -> "_Parts":
        fusing, carry = channels.without(found.fusing), channels.without(found.carry)
        maps = channels.without(torch.stack([found.first_embedding, found.later_embedding]))
        both = maps.flatten(0, 1)  # [2H, H]
        outputs = torch.linalg.eigh(both @ found.embedding_moments @ both.T).eigenvectors
        outputs = outputs[:, -rank:]
        values = outputs.T @ both
        # The smallest directions of the states that later steps read; the two channels are large.
        states = found.state_moments.clone()
        taken = [channels.constant, channels.flag]
        states[taken] = states[:, taken] = 0
        states[taken, taken] = states.diagonal().sum()
        directions = torch.linalg.eigh(states).eigenvectors[:, :rank]
        sizes = (values @ found.embedding_moments * values).sum(dim=1)
        sizes = (sizes / found.num_embeddings).clamp(min=1e-12).sqrt()
        first, later = (outputs * sizes).unflatten(0, (2, -1))
        identity = torch.eye(len(carry), dtype=carry.dtype, device=carry.device)
        kept = channels.without(identity)
        outside = kept - directions @ directions.T
        return cls(
            fusing=outside @ fusing,
            values=values / sizes.unsqueeze(1),
            directions=directions,
            first=first - directions,
            later=carry @ outside + later @ directions.T - kept,
        )


def _own_heads(config: DraftConfig) -> int:
    """Return how many heads attend to their own position: one of each group, half if each is one.

    The others are free for what training finds.
    """
    is_grouped = config.num_attention_heads > config.num_key_value_heads
    return config.num_key_value_heads if is_grouped else max(1, config.num_key_value_heads // 2)


def _write_attention(draft: DraftModel, parts: _Parts, channels: Channels) -> None:
    config, attention = draft.config, draft.midlayer.self_attn
    size, head_dim = config.hidden_size, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    pairs = torch.arange(min(_PAIRS, head_dim // 2))
    dims = torch.cat([pairs, pairs + head_dim // 2])
    attention.o_proj.weight.zero_()
    for head in range(_own_heads(config)):
        key = slice(head * head_dim, (head + 1) * head_dim)
        query = slice(head * group * head_dim, (head * group + 1) * head_dim)
        attention.q_proj.weight[query] = 0
        attention.q_proj.weight[query.start + dims, size + channels.constant] = _query_size(config)
        attention.k_proj.weight[key.start + dims] = 0
        attention.k_proj.weight[key.start + dims, size + channels.constant] = 1
        values, directions = parts.values[key], parts.directions[:, key]
        attention.v_proj.weight[key] = 0
        attention.v_proj.weight[key, :size][: len(values)] = values.to(attention.v_proj.weight)
        own = attention.o_proj.weight[:, query]
        own[:, : len(values)] = directions.to(own)


def _query_size(config: DraftConfig) -> float:
    """Return the size of queries, for keys of size 1, that lets a head see its own position."""
    speeds, factor = frequencies(config)
    speeds = speeds[: min(_PAIRS, config.head_dim // 2)].double()
    farthest = min(_DISTANCES, config.max_position_embeddings)
    if config.sliding_window is not None:
        farthest = min(farthest, config.sliding_window - 1)
    if not farthest:  # it sees no other position
        return 0.0
    distances = torch.arange(1, farthest + 1)
    # Two equal components of a pair have the product 2 cos(angle).
    fall = 2 * factor**2 * (1 - torch.cos(distances[:, None] * speeds)).sum(dim=1)
    return _NATS * math.sqrt(config.head_dim) / float(fall.min().clamp(min=0.1))


def _write_units(draft: DraftModel, parts: _Parts, channels: Channels, *, flag: float) -> None:
    mlp, config = draft.midlayer.mlp, draft.config
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    taken = [channels.constant, channels.flag]
    # Random units: what their gates and inputs see has the size 1.
    spread = 1 / (_UNIT_INPUT * math.sqrt(config.hidden_size))
    for weight in (gate, up):
        weight.mul_(spread / weight.std())
        weight[:, taken] /= spread
    down.zero_()
    rank = parts.directions.shape[1]
    left, sizes, right = torch.linalg.svd(parts.later)
    number = min(config.hidden_size, config.intermediate_size - rank - 1)
    opened = nn.functional.silu(torch.tensor(_GATE)).item()
    at_first, clearing, later = slice(0, rank), rank, slice(rank + 1, rank + 1 + number)
    gate[: later.stop] = 0
    up[: later.stop] = 0
    gate[: rank + 1, channels.flag] = _GATE
    gate[later, channels.constant] = _GATE
    gate[later, channels.flag] = -_GATE
    up[at_first] = (parts.directions.T / _UNIT_INPUT).to(up)
    down[:, at_first] = (parts.first / opened).to(down)
    up[clearing, channels.constant] = 1
    down[channels.flag, clearing] = -flag / opened
    up[later] = (right[:number] / _UNIT_INPUT).to(up)
    down[:, later] = (left[:, :number] * sizes[:number] / opened).to(down)
