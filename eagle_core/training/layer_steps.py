"""One decoder layer of the draft over the training-time-test steps of a packed batch.

Step 0 gives keys and values of all indices; later steps add those of the indices that are left.
Layers before the last one compute step 0 everywhere, for the next layer's keys; the last one only
where a loss needs it.

Shapes: N packed tokens, X indices with keys in step 0, A_i indices of step i, H draft hidden, N
heads, K key-value heads, E head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from eagle_core.bfloat16 import widened
from eagle_core.draft.model import DraftLayer, gated
from eagle_core.draft.rotary import rotate
from eagle_core.training.attention import packed_ttt_attention
from eagle_core.training.flex_attention import flex_ttt_attention
from eagle_core.training.repeated_linear import RepeatedLinear
from eagle_core.training.step_plan import HostRows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Where a layer computes in one step."""

    step: int
    indices: Tensor
    """[A] in the packed batch, ascending"""
    first: Tensor
    """[A] index of the first token of its sequence"""
    cos: Tensor
    """[A, 1, E]"""
    sin: Tensor
    """[A, 1, E]"""
    host: HostRows
    """Indices and first tokens on the host"""

    def at(self, kept: Tensor, host: HostRows) -> "Rows":
        """Return those at `kept`, places among the indices; `host` has the same on the host."""
        return Rows(
            host=host,
            step=self.step,
            indices=self.indices[kept],
            first=self.first[kept],
            cos=self.cos[kept],
            sin=self.sin[kept],
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerOutput:
    """What a layer computes at its rows."""

    attended: Tensor
    """[A, H] what the feed-forward block reads"""
    state: Tensor
    """[A, H] the pre-norm output"""


class LayerSteps:
    """Applies a layer: `begin` in step 0, then `advance` in each later step."""

    def __init__(
        self,
        layer: DraftLayer,
        embedding: Tensor | None,
        dtype: torch.dtype,
        *,
        checkpointed: bool,
        fused: bool,
    ) -> None:
        """Read the layer's weights.

        Args:
            layer: of the draft.
            embedding: [N, H] the embeddings of the tokens, for the first layer; None for others.
            dtype: of products.
            checkpointed: whether to recompute the feed-forward block in the backward pass.
            fused: whether to use FlexAttention.

        """
        attention = layer.self_attn
        self._layer, self._dtype = layer, dtype
        self._project = (
            _Projections(layer, dtype)
            if embedding is None
            else _ProjectionsWithEmbedding(layer, embedding, dtype)
        )
        self._output = RepeatedLinear(attention.o_proj.weight, dtype, attention.o_proj.bias)
        self._feed_forward = _feed_forward(layer, dtype, checkpointed=checkpointed)
        self._attend = flex_ttt_attention if fused else packed_ttt_attention
        self._keys, self._values = torch.empty(0), torch.empty(0)
        self._own: tuple[Tensor, Tensor] | None = None

    def begin(self, state: Tensor, every: Rows, kept: Tensor | None, host: HostRows) -> LayerOutput:
        """Compute step 0 for states [X, H] of `every` index; only at `kept`, if it is given.

        `host` has the indices that are kept.
        """
        normed, residual = self._normed(state)
        keys, self._values = self._project.keys_values(normed, every)
        self._keys = rotate(keys, every.cos, every.sin)
        if kept is None:
            return self._attended(normed, residual, every)
        return self._attended(normed[kept], residual[kept], every.at(kept, host))

    def advance(self, state: Tensor, rows: Rows, kept: Tensor) -> LayerOutput:
        """Compute a later step for states [A, H], which are at `kept` among those before."""
        normed, residual = self._normed(state)
        key, value = self._project.keys_values(normed, rows)
        own = rotate(key, rows.cos, rows.sin).unsqueeze(1), value.unsqueeze(1)
        if self._own is not None:
            before = (states[kept] for states in self._own)
            keys, values = (torch.cat(pair, dim=1) for pair in zip(before, own, strict=True))
            own = keys, values
        self._own = own
        return self._attended(normed, residual, rows)

    def _normed(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the projections read, and where the residual stream starts."""
        if self._layer.self_attn.layer:
            return self._layer.input_layernorm(state).to(self._dtype), state
        normed = self._layer.hidden_norm(state)
        return normed.to(self._dtype), self._layer.residual(state, normed)

    def _attended(self, normed: Tensor, residual: Tensor, rows: Rows) -> LayerOutput:
        query = rotate(self._project.queries(normed, rows), rows.cos, rows.sin)
        none = self._keys.new_zeros(len(rows.indices), 0, *self._keys.shape[1:])
        own_keys, own_values = self._own or (none, none)
        attention_output = self._attend(
            query,
            self._keys,
            self._values,
            own_keys,
            own_values,
            rows.indices,
            rows.first,
            self._layer.self_attn.window,
            host=rows.host,
        )
        attended = residual + self._output(attention_output.flatten(1))
        return LayerOutput(attended=attended, state=attended + self._feed_forward(attended))


class _Projections:
    """The query, key and value projections of a layer that reads hidden states only."""

    def __init__(self, layer: DraftLayer, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        self._attention, self._dtype = attention, dtype
        weight, bias = _key_value(layer)
        self._query = RepeatedLinear(attention.q_proj.weight, dtype, attention.q_proj.bias)
        self._key_value = RepeatedLinear(weight, dtype, bias)

    def queries(self, normed: Tensor, rows: Rows) -> Tensor:
        """Return [A, N, E] for normed states [A, H]."""
        return self._normed(self._split(self._projected_query(normed, rows)), "q_norm")

    def keys_values(self, normed: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return keys and values [A, K, E] for normed states [A, H]."""
        key, value = self._projected_key_value(normed, rows).chunk(2, dim=-1)
        return self._normed(self._split(key), "k_norm"), self._split(value)

    def _projected_query(self, normed: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        return self._query(normed)

    def _projected_key_value(self, normed: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        return self._key_value(normed)

    def _split(self, states: Tensor) -> Tensor:
        head_dim = self._attention.head_dim
        return states.reshape(len(states), states.shape[-1] // head_dim, head_dim)

    def _normed(self, heads: Tensor, name: str) -> Tensor:
        norm = getattr(self._attention, name)
        return heads if norm is None else norm(widened(heads)).to(self._dtype)


class _ProjectionsWithEmbedding(_Projections):
    """Those of the first layer, in halves: embedding once, hidden state in each step."""

    def __init__(self, layer: DraftLayer, embedding: Tensor, dtype: torch.dtype) -> None:
        attention, size = layer.self_attn, embedding.shape[-1]
        self._attention, self._dtype = attention, dtype
        embedding = layer.input_layernorm(embedding)
        query, (key_value, bias) = attention.q_proj.weight, _key_value(layer)
        self._query = RepeatedLinear(query[:, size:], dtype)
        self._key_value = RepeatedLinear(key_value[:, size:], dtype)
        self._of_query = functional.linear(embedding, query[:, :size], attention.q_proj.bias)
        self._of_key_value = functional.linear(embedding, key_value[:, :size], bias)

    def _projected_query(self, normed: Tensor, rows: Rows) -> Tensor:
        return self._query(normed) + self._of_query[rows.indices + 1 + rows.step]

    def _projected_key_value(self, normed: Tensor, rows: Rows) -> Tensor:
        return self._key_value(normed) + self._of_key_value[rows.indices + 1 + rows.step]


def _key_value(layer: DraftLayer) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the key and value projections as one."""
    key, value = layer.self_attn.k_proj, layer.self_attn.v_proj
    bias = None if key.bias is None else torch.cat([key.bias, value.bias])
    return torch.cat([key.weight, value.weight]), bias


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
        RepeatedLinear(part.weight, dtype, part.bias)
        for part in (block.gate_proj, block.up_proj, block.down_proj)
    )
    return lambda state: gated(normed(state), gate=gate, up=up, down=down)
