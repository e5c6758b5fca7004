"""The EAGLE-3 draft: fused target states in, one decoder layer, draft-vocabulary logits out.

Modules have their published names (docs/design.md, section 4), so `published_tensors` are
an export. At index t the layer's input is the embedding of token t+1 concatenated with the hidden
state of token t. The recurrent state is the layer's output *before* the final norm.

Shapes: B batch, T tokens, H draft hidden, Ht target hidden, D draft vocabulary, V target
vocabulary, N heads, K key-value heads, E head size.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from eagle_core.draft.config import NUM_AUX_LAYERS, DraftConfig
from eagle_core.draft.kv_cache import DraftCache
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError


class Attention(nn.Module):
    """Grouped-query attention whose input is twice as wide as its output."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width = 2 * config.hidden_size
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, query_size, bias=False)
        self.k_proj = nn.Linear(width, key_size, bias=False)
        self.v_proj = nn.Linear(width, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, inputs: Tensor, cos: Tensor, sin: Tensor, cache: DraftCache) -> Tensor:
        """Return [B, T, H] for inputs [B, T, 2H] after `cache`; cos and sin are [B, 1, T, E]."""
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, values = cache.append(rotate(key, cos, sin), value)
        attention_output = functional.scaled_dot_product_attention(
            rotate(query, cos, sin),
            keys,
            values,
            attn_mask=cache.visible(query.shape[2]),
            enable_gqa=True,
        )
        output: Tensor = self.o_proj(attention_output.transpose(1, 2).flatten(2))
        return output


class Mlp(nn.Module):
    """Gated SiLU feed-forward block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

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
    """The only decoder layer; the residual stream starts at the un-normed hidden state."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.hidden_norm = nn.RMSNorm(size, eps=eps)
        self.input_layernorm = nn.RMSNorm(size, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)

    def forward(
        self, embedding: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DraftCache
    ) -> Tensor:
        """Return the pre-norm state [B, T, H] for embeddings and states [B, T, H]."""
        inputs = torch.cat([self.input_layernorm(embedding), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(inputs, cos, sin, cache)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class DraftModel(nn.Module):
    """An EAGLE-3 draft; `embed_tokens` is the target's embedding, frozen."""

    d2t: Tensor
    """[D] int64: target id minus draft id."""
    t2d: Tensor
    """[V] bool: whether the draft vocabulary contains the token."""
    aux_scale: Tensor
    """[3Ht] powers of two by which the inputs of `fc` are divided; ones unless training set it."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size).requires_grad_(
            requires_grad=False
        )
        self.fc = nn.Linear(NUM_AUX_LAYERS * config.target_hidden_size, size, bias=False)
        self.fc_norm = nn.ModuleList(
            nn.RMSNorm(config.target_hidden_size, eps=config.rms_norm_eps)
            for _ in range(NUM_AUX_LAYERS if config.fc_norm else 0)
        )
        self.midlayer = DraftLayer(config)
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        fused_size = NUM_AUX_LAYERS * config.target_hidden_size
        self.register_buffer("aux_scale", torch.ones(fused_size))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state dict, or what `published_tensors` returned: channels are unscaled then."""
        self.load_state_dict({"aux_scale": torch.ones_like(self.aux_scale), **tensors})

    def published_tensors(self) -> dict[str, Tensor]:
        """Return the state dict as engines read it: with the fusing matrix of unscaled states."""
        tensors = self.state_dict()
        del tensors["aux_scale"]
        return {**tensors, "fc.weight": self.fusing_weight().detach()}

    @torch.no_grad()
    def initialise(
        self, *, embedding: Tensor, lm_head: Tensor, vocabulary: DraftVocabulary, seed: int
    ) -> None:
        """Copy the target's embedding [V, H] and the draft vocabulary's rows of its head [V, H].

        Other matrices are drawn from a normal distribution with deviation 0.02, seeded by `seed`.
        """
        config = self.config
        expected = ((config.vocab_size, config.hidden_size), config.draft_vocab_size)
        if (tuple(embedding.shape), len(vocabulary)) != expected:
            raise ConfigError(
                f"draft with vocabulary and width {expected} got an embedding "
                f"{tuple(embedding.shape)} and {len(vocabulary)} draft tokens; use the target's own"
            )
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.normal_(std=0.02, generator=generator)
        self.embed_tokens.weight.copy_(embedding)
        self.aux_scale.fill_(1)
        self.d2t.copy_(torch.from_numpy(vocabulary.d2t))
        self.t2d.copy_(torch.from_numpy(vocabulary.t2d))
        self.lm_head.weight.copy_(lm_head[self.t2d])

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
        """Return what `fc` reads of aux states [..., 3Ht]: normed with `fc_norm`, and scaled."""
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
        cos, sin = rotary(positions, self.config)
        output: Tensor = self.midlayer(
            self.embed_tokens(input_ids),
            hidden,
            cos.unsqueeze(1).to(hidden.dtype),
            sin.unsqueeze(1).to(hidden.dtype),
            cache,
        )
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the draft's logits [..., D] for pre-norm states [..., H]."""
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


def rotary(positions: Tensor, config: DraftConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin [..., E] in float32 for positions [...]."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angles = positions.unsqueeze(-1).float() * config.rope_theta ** -exponents.float()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [..., E], halves paired as Llama does."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
