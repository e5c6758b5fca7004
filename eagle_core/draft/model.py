"""The EAGLE-3 draft: fused target states in, decoder layers, draft-vocabulary logits out.

Modules have their published names (docs/design.md, section 4), so `published_tensors` are
an export. At index t the first layer's input is the embedding of token t+1 concatenated with the
hidden state of token t; further layers, if there are any, read only what the one before puts out.
The recurrent state is the last layer's output *before* the final norm. What each variant of
`DraftConfig` computes is what vLLM computes for it.

Shapes: B batch, T tokens, H draft hidden, Ht target hidden, D draft vocabulary, V target
vocabulary, N heads, K key-value heads, E head size.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from eagle_core.draft.config import NUM_AUX_LAYERS, DraftConfig
from eagle_core.draft.kv_cache import DraftCache
from eagle_core.draft.layout import EMBEDDING, HEAD
from eagle_core.draft.projection import with_width
from eagle_core.draft.rotary import rotary, rotate
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError


class Attention(nn.Module):
    """Grouped-query attention; the input of the first layer is twice as wide as its output."""

    def __init__(self, config: DraftConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size if layer else 2 * config.hidden_size
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.sliding_window
        self.q_proj = nn.Linear(width, query_size, bias=bias)
        self.k_proj = nn.Linear(width, key_size, bias=bias)
        self.v_proj = nn.Linear(width, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
            for _ in range(2)
        )

    def forward(self, inputs: Tensor, cos: Tensor, sin: Tensor, cache: DraftCache) -> Tensor:
        """Return [B, T, H] for inputs [B, T, H or 2H] after `cache`; cos and sin: [B, 1, T, E]."""
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        keys, values = cache.append(rotate(key, cos, sin), value, layer=self.layer)
        attention_output = functional.scaled_dot_product_attention(
            rotate(query, cos, sin),
            keys,
            values,
            attn_mask=cache.visible(query.shape[2], self.window),
            enable_gqa=True,
        )
        output: Tensor = self.o_proj(attention_output.transpose(1, 2).flatten(2))
        return output


class Mlp(nn.Module):
    """Gated SiLU feed-forward block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [..., H] for [..., H]."""
        return gated(hidden, gate=self.gate_proj, up=self.up_proj, down=self.down_proj)


def gated(
    hidden: Tensor,
    *,
    gate: Callable[[Tensor], Tensor],
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
) -> Tensor:
    """Apply the gated feed-forward block with its three linear maps: [..., H] to [..., H]."""
    return down(functional.silu(gate(hidden)) * up(hidden))


class DraftLayer(nn.Module):
    """A decoder layer. Only the first one, number 0, reads the embedding and has `hidden_norm`."""

    def __init__(self, config: DraftConfig, number: int = 0) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual and number == 0
        self.self_attn = Attention(config, number)
        self.mlp = Mlp(config)
        if number == 0:
            self.hidden_norm = nn.RMSNorm(size, eps=eps)
        self.input_layernorm = nn.RMSNorm(size, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)

    def residual(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """Return where the residual stream starts: at the layer's input, or at it normed."""
        return normed if self.norm_before_residual else hidden

    def forward(
        self,
        embedding: Tensor | None,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: DraftCache,
    ) -> Tensor:
        """Return the pre-norm state [B, T, H] for states [B, T, H].

        The first layer also needs the embeddings [B, T, H]; to the others they are None.
        """
        if embedding is None:
            inputs, residual = self.input_layernorm(hidden), hidden
        else:
            normed = self.hidden_norm(hidden)
            inputs = torch.cat([self.input_layernorm(embedding), normed], dim=-1)
            residual = self.residual(hidden, normed)
        hidden = residual + self.self_attn(inputs, cos, sin, cache)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class DraftModel(nn.Module):
    """An EAGLE-3 draft; `embed_tokens` is frozen: the target's, or made from it."""

    d2t: Tensor
    """[D] int64: target id minus draft id."""
    t2d: Tensor
    """[V] bool: whether the draft vocabulary contains the token."""
    aux_scale: Tensor
    """[3Ht] powers of two by which the inputs of `fc` are divided; ones unless training set it."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        fused_size = NUM_AUX_LAYERS * config.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size).requires_grad_(
            requires_grad=False
        )
        self.fc = nn.Linear(fused_size, size, bias=False)
        self.input_norm = nn.RMSNorm(fused_size, eps=eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(
            nn.RMSNorm(config.target_hidden_size, eps=eps)
            for _ in range(NUM_AUX_LAYERS if config.fc_norm else 0)
        )
        self.midlayer = DraftLayer(config)
        self.layers = nn.ModuleDict(
            {str(number): DraftLayer(config, number) for number in config.further_layers}
        )
        self.norm = nn.RMSNorm(size, eps=eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.lm_head.requires_grad_(requires_grad=not config.target_head)
        self.register_buffer("aux_scale", torch.ones(fused_size))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    def every_layer(self) -> Iterator[DraftLayer]:
        """Yield the decoder layers, the first one first."""
        yield self.midlayer
        for layer in self.layers.values():
            assert isinstance(layer, DraftLayer)  # noqa: S101 (nothing else is put there)
            yield layer

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state dict, or what `published_tensors` returned: channels are unscaled then."""
        self.load_state_dict({"aux_scale": torch.ones_like(self.aux_scale), **tensors})

    def published_tensors(self) -> dict[str, Tensor]:
        """Return the state dict as engines read it: with the fusing matrix of unscaled states."""
        tensors = self.state_dict()
        del tensors["aux_scale"]
        return {**tensors, "fc.weight": self.fusing_weight().detach()}

    def target_tensors(self) -> dict[str, Tensor]:
        """Return the frozen tensors that are the target's own, by name: checkpoints omit them."""
        tensors: dict[str, Tensor] = {}
        if not self.config.has_own_embedding:
            tensors[EMBEDDING] = self.embed_tokens.weight.detach()
        if self.config.target_head:
            tensors[HEAD] = self.lm_head.weight.detach()
        return tensors

    @torch.no_grad()
    def take_target_tensors(self, *, embedding: Tensor, lm_head: Tensor) -> None:
        """Copy what is the target's own: its embedding [V, Ht] or head [V, Ht], or both."""
        sources = {EMBEDDING: embedding, HEAD: lm_head}
        for name, tensor in self.target_tensors().items():
            tensor.copy_(sources[name])

    def draft_rows(self, lm_head: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [D, Ht] the draft vocabulary's rows of the target's head [V, Ht].

        They are on the draft's device; the whole head need not be.
        """
        rows = lm_head[self.t2d.to(lm_head.device)]
        return rows.to(self.t2d.device, dtype)

    @torch.no_grad()
    def initialise(
        self, *, embedding: Tensor, lm_head: Tensor, vocabulary: DraftVocabulary, seed: int
    ) -> None:
        """Take the target's embedding [V, Ht] and the draft vocabulary's rows of its head [V, Ht].

        For a draft of another width both are projected (`with_width`). Other matrices are drawn
        from a normal distribution with deviation 0.02, seeded by `seed`; biases are zero.
        """
        config = self.config
        expected = ((config.vocab_size, config.target_hidden_size), config.draft_vocab_size)
        if (tuple(embedding.shape), len(vocabulary)) != expected:
            raise ConfigError(
                f"draft with vocabulary and target width {expected} got an embedding "
                f"{tuple(embedding.shape)} and {len(vocabulary)} draft tokens; use the target's own"
            )
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.normal_(std=0.02, generator=generator)
            if name.endswith(".bias"):
                parameter.zero_()
        self.aux_scale.fill_(1)
        self.d2t.copy_(torch.from_numpy(vocabulary.d2t))
        self.t2d.copy_(torch.from_numpy(vocabulary.t2d))
        self.embed_tokens.weight.copy_(with_width(embedding, config.hidden_size))
        self.lm_head.weight.copy_(with_width(lm_head[self.t2d], config.hidden_size))

    @torch.no_grad()
    def set_aux_scale(self, scale: Tensor) -> None:
        """Set `aux_scale` [3Ht], powers of two, and keep the function of aux states, to the bit."""
        self.fc.weight.mul_(scale / self.aux_scale)
        self.aux_scale.copy_(scale)

    def fuse(self, aux: Tensor) -> Tensor:
        """Return the fused state [..., H] of aux states [..., 3Ht], low to high."""
        fused: Tensor = self.fc(self.fusing_inputs(aux))
        return fused

    def fusing_inputs(self, aux: Tensor) -> Tensor:
        """Return what `fc` reads of aux states [..., 3Ht]: normed as configured, and scaled."""
        if self.input_norm is not None:
            aux = self.input_norm(aux)
        if self.config.fc_norm:
            layers = aux.chunk(NUM_AUX_LAYERS, dim=-1)
            normed = [norm(layer) for norm, layer in zip(self.fc_norm, layers, strict=True)]
            aux = torch.cat(normed, dim=-1)
        return aux / self.aux_scale

    def fusing_weight(self) -> Tensor:
        """Return [H, 3Ht] the matrix that fuses unscaled aux states; `fc` is the trained one.

        The powers of two of `aux_scale` only move exponents, there as here: nothing is rounded.
        """
        return self.fc.weight / self.aux_scale

    def recurrent(self, hidden: Tensor) -> Tensor:
        """Return the states that the next step reads, from pre-norm states [..., H]."""
        return self.norm(hidden) if self.config.norm_output else hidden

    def decode(
        self, input_ids: Tensor, hidden: Tensor, positions: Tensor, cache: DraftCache
    ) -> Tensor:
        """Return the pre-norm states [B, T, H] of ids [B, T] and states [B, T, H] after `cache`."""
        angles = rotary(positions, self.config)
        cos, sin = (angle.unsqueeze(1).to(hidden.dtype) for angle in angles)
        cache.place(positions)
        embedding: Tensor | None = self.embed_tokens(input_ids)
        for layer in self.every_layer():
            hidden = layer(embedding, hidden, cos, sin, cache)
            embedding = None  # of the first layer only
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the draft's logits [..., D] for pre-norm states [..., H]."""
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits
