"""Sizes of a draft model, and the choice of a run's checkpoint."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PretrainedConfig

from eagle_core.draft.rope_scaling import checked_scaling

NUM_AUX_LAYERS = 3
_NORM_EPS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_LATER: tuple[str, ...] = (
    *("num_hidden_layers", "attention_bias", "mlp_bias", "qk_norm", "sliding_window"),
    *("rope_scaling", "norm_before_fc", "norm_before_residual", "target_head"),
)
"""Fields that checkpoints of older versions do not record."""


class DraftConfig(BaseModel):
    """Sizes of a draft model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(gt=0)
    target_hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0, description="V, size of the target's vocabulary.")
    draft_vocab_size: int = Field(gt=0, description="D, number of tokens the draft can propose.")
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    max_position_embeddings: int = Field(default=2048, gt=0)
    num_hidden_layers: int = Field(
        default=1,
        ge=1,
        le=4,
        description="Decoder layers. Only the first one reads the token embedding.",
    )
    attention_bias: bool = Field(
        default=False,
        description="Biases of the query, key, value and output projections; with `qk_norm`, as in "
        "Qwen3, not of the output projection.",
    )
    mlp_bias: bool = Field(default=False, description="Biases of the feed-forward block.")
    qk_norm: bool = Field(
        default=False, description="RMSNorm of the queries and keys of each head, as in Qwen3."
    )
    sliding_window: int | None = Field(
        default=None,
        gt=0,
        description="W: a token sees itself and the W - 1 tokens before it; None: all before it.",
    )
    rope_scaling: dict[str, Any] | None = Field(
        default=None,
        description="What scales the rotary embedding: transformers' `rope_parameters` without "
        "rope_theta; None for the plain one.",
    )
    fc_norm: bool = Field(
        default=False, description="EAGLE-3.1: normalise each aux state before fusing them."
    )
    norm_output: bool = Field(
        default=False, description="EAGLE-3.1: the recurrent state is the final norm's output."
    )
    norm_before_fc: bool = Field(
        default=False, description="One RMSNorm over all three aux states before fusing them."
    )
    norm_before_residual: bool = Field(
        default=False,
        description="The residual stream starts at the normed hidden state, as in drafts of the "
        "speculators library.",
    )
    target_head: bool = Field(
        default=False,
        description="The output head is the target's own, frozen, over its full vocabulary.",
    )

    @model_validator(mode="after")
    def _require_known_combination(self) -> Self:
        if self.qk_norm and self.mlp_bias:
            raise ValueError(
                "qk_norm and mlp_bias do not go together: engines compute drafts with qk_norm as "
                "Qwen3 layers, whose feed-forward block has no biases; set one of them to false"
            )
        if self.target_head and self.draft_vocab_size != self.vocab_size:
            raise ValueError(
                f"target_head needs the target's full vocabulary: set draft_vocab_size to "
                f"{self.vocab_size} (it is {self.draft_vocab_size}), or target_head to false"
            )
        if self.target_head and self.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"target_head needs a draft as wide as the target: set hidden_size to "
                f"{self.target_hidden_size} (it is {self.hidden_size}), or target_head to false"
            )
        if self.rope_scaling is not None:
            scaling = checked_scaling(
                self.rope_scaling,
                rope_theta=self.rope_theta,
                head_dim=self.head_dim,
                max_position_embeddings=self.max_position_embeddings,
            )
            object.__setattr__(self, "rope_scaling", scaling)  # frozen from here on
        return self

    @property
    def has_own_embedding(self) -> bool:
        """Whether the embedding is not the target's: the draft has another width."""
        return self.hidden_size != self.target_hidden_size

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias and not self.qk_norm

    @property
    def further_layers(self) -> range:
        """The numbers of the layers after the first one, which is 0."""
        return range(1, self.num_hidden_layers)

    def identity(self) -> dict[str, Any]:
        """Return the fields that must not change between two attempts at a run.

        Variants that drafts of older versions did not have appear only where they are set.
        """
        return self.model_dump(mode="json", exclude=self._unset())

    def identity_json(self) -> str:
        """Return `identity` as JSON, as older versions digested it."""
        return self.model_dump_json(exclude=self._unset())

    def _unset(self) -> set[str]:
        fields = type(self).model_fields
        return {name for name in _LATER if getattr(self, name) == fields[name].default}

    @classmethod
    def from_target(
        cls,
        target: PretrainedConfig,
        *,
        draft_vocab_size: int,
        fc_norm: bool = False,
        norm_output: bool = False,
    ) -> Self:
        """Return the sizes of a one-layer draft as wide as the target.

        Where the target has no `rms_norm_eps`, the draft's is its `norm_eps`, `layer_norm_eps` or
        `layer_norm_epsilon`, else 1e-6.
        """
        rope = getattr(target, "rope_parameters", None) or {}
        if "full_attention" in rope:  # models that mix attention types have one set per type
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
            rms_norm_eps=_norm_eps(target),
            rope_theta=float(rope.get("rope_theta", getattr(target, "rope_theta", 10000.0))),
            max_position_embeddings=target.max_position_embeddings,
            fc_norm=fc_norm,
            norm_output=norm_output,
        )


def _norm_eps(target: PretrainedConfig) -> float:
    found = (getattr(target, name, None) for name in _NORM_EPS)
    return float(next((value for value in found if value is not None), 1e-6))


CheckpointChoice = Literal["best", "newest"]
