"""The EAGLE-3 draft: fused target states in, one decoder layer, logits over few tokens out.

Modules carry their published names (docs/design.md, section 4): a state dict is an export. The
input of the layer at index t is the embedding of token t+1 beside the hidden state of token t; the
recurrent state is the output of the layer *before* the final norm.

Shapes: B batch, T tokens, H draft hidden, Ht target hidden, D draft vocabulary, V target
vocabulary, N heads, K key-value heads, E head size.
"""

from collections.abc import Callable
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError

NUM_AUX_LAYERS = 3


class DraftConfig(BaseModel):
    """Sizes of a draft model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(gt=0)
    target_hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0, description="V, the target's vocabulary.")
    draft_vocab_size: int = Field(gt=0, description="D, what the draft can propose.")
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    max_position_embeddings: int = Field(default=2048, gt=0)
    fc_norm: bool = Field(
        default=False, description="EAGLE-3.1: normalise each aux state before they are fused."
    )
    norm_output: bool = Field(
        default=False, description="EAGLE-3.1: the recurrent state is the final norm's output."
    )

    @classmethod
    def from_target(
        cls,
        target: PretrainedConfig,
        *,
        draft_vocab_size: int,
        fc_norm: bool = False,
        norm_output: bool = False,
    ) -> Self:
        """Return a draft of the target's own width, one layer deep."""
        rope = getattr(target, "rope_parameters", None) or {}
        if "full_attention" in rope:  # models that mix attention kinds keep one set for each
            rope = rope["full_attention"]
        heads = target.num_attention_heads
        return cls(
            hidden_size=target.hidden_size,
            target_hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=getattr(target, "num_key_value_heads", None) or heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=min(draft_vocab_size, target.vocab_size),
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=float(rope.get("rope_theta", getattr(target, "rope_theta", 10000.0))),
            max_position_embeddings=target.max_position_embeddings,
            fc_norm=fc_norm,
            norm_output=norm_output,
        )


class DraftCache:
    """Keys and values of the entries so far, [B, K, length, E] each.

    The sequences of a batch may differ in length: entries that only fill a row up are hidden.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._is_true: Tensor | None = None

    @property
    def length(self) -> int:
        """Return the number of entries."""
        return 0 if self._keys is None else self._keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add entries [B, K, T, E]; return all keys and values."""
        if self._keys is not None and self._values is not None:
            keys = torch.cat([self._keys, keys], dim=2)
            values = torch.cat([self._values, values], dim=2)
        self._keys, self._values = keys, values
        return keys, values

    def crop(self, length: int) -> None:
        """Forget every entry from `length` on."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys[:, :, :length]
            self._values = self._values[:, :, :length]
        if self._is_true is not None:
            self._is_true = self._is_true[:, :length]

    def hide(self, is_true: Tensor) -> None:
        """Hide from every later entry those of the newest [B, T] that are False."""
        before = self._is_true_of(self.length - is_true.shape[1], is_true)
        self._is_true = torch.cat([before, is_true], dim=1)

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but those at `rows`."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]
        if self._is_true is not None:
            self._is_true = self._is_true[rows]

    def visible(self, num_new: int) -> Tensor | None:
        """Return which entries each of the newest `num_new` sees, [B or 1, 1, T, length].

        All of its sequence at or before it; None if that is everything.
        """
        if self._keys is None or (num_new == 1 and self._is_true is None):
            return None
        causal = torch.ones(num_new, self.length, dtype=torch.bool, device=self._keys.device)
        causal = causal.tril(self.length - num_new)[None, None]
        if self._is_true is None:
            return causal
        is_true = self._is_true_of(self.length, self._is_true)
        return causal & is_true[:, None, None]

    def _is_true_of(self, length: int, like: Tensor) -> Tensor:
        """Return [B, length], True for entries that nobody spoke of."""
        known = like[:, :0] if self._is_true is None else self._is_true
        return functional.pad(known, (0, length - known.shape[1]), value=True)


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
        """Return [B, T, H] for inputs [B, T, 2H] behind `cache`; cos and sin are [B, 1, T, E]."""
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, values = cache.append(rotate(key, cos, sin), value)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, cos, sin),
            keys,
            values,
            attn_mask=cache.visible(query.shape[2]),
            enable_gqa=True,
        )
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
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
    """Return [..., H] for [..., H]: what the feed-forward block does with its three maps."""
    return down(functional.silu(gate(hidden)) * up(hidden))


class DraftLayer(nn.Module):
    """The one decoder layer; the residual stream starts at the un-normed hidden state."""

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
    """An EAGLE-3 draft; `embed_tokens` is the target's and frozen."""

    d2t: Tensor
    """[D] int64: target id minus draft id."""
    t2d: Tensor
    """[V] bool: whether the draft vocabulary has the token."""

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
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @torch.no_grad()
    def initialise(
        self, *, embedding: Tensor, lm_head: Tensor, vocabulary: DraftVocabulary, seed: int
    ) -> None:
        """Take the target's embedding [V, H] and the head's rows of the draft vocabulary [V, H].

        Everything else is drawn from a normal distribution of deviation 0.02 under `seed`.
        """
        config = self.config
        expected = ((config.vocab_size, config.hidden_size), config.draft_vocab_size)
        if (tuple(embedding.shape), len(vocabulary)) != expected:
            raise ConfigError(
                f"draft of vocabulary and width {expected} was given an embedding "
                f"{tuple(embedding.shape)} and {len(vocabulary)} draft tokens; use the target's own"
            )
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.normal_(std=0.02, generator=generator)
        self.embed_tokens.weight.copy_(embedding)
        self.d2t.copy_(torch.from_numpy(vocabulary.d2t))
        self.t2d.copy_(torch.from_numpy(vocabulary.t2d))
        self.lm_head.weight.copy_(lm_head[self.t2d])

    def fuse(self, aux: Tensor) -> Tensor:
        """Return the fused state [..., H] of aux states [..., 3Ht], low to high."""
        if self.config.fc_norm:
            layers = aux.chunk(NUM_AUX_LAYERS, dim=-1)
            normed = [norm(layer) for norm, layer in zip(self.fc_norm, layers, strict=True)]
            aux = torch.cat(normed, dim=-1)
        fused: Tensor = self.fc(aux)
        return fused

    def recurrent(self, hidden: Tensor) -> Tensor:
        """Return what the next step reads of pre-norm states [..., H]."""
        return self.norm(hidden) if self.config.norm_output else hidden

    def decode(
        self, input_ids: Tensor, hidden: Tensor, positions: Tensor, cache: DraftCache
    ) -> Tensor:
        """Return the pre-norm state [B, T, H] of ids [B, T] and states [B, T, H] behind `cache`."""
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
