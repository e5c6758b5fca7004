"""Sizes of a draft model, and the choice of a run's checkpoint."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from transformers import PretrainedConfig

NUM_AUX_LAYERS = 3
_NORM_EPS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")


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
    fc_norm: bool = Field(
        default=False, description="EAGLE-3.1: normalise each aux state before fusing them."
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
