"""Sizes of a draft model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PretrainedConfig

from eagle_core.draft.rope_scaling import checked_scaling
from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.errors import ConfigError, MismatchError

logger = logging.getLogger(__name__)

NUM_AUX_LAYERS = 3
_NORM_EPS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_LATER = {"num_hidden_layers", "attention_bias", "mlp_bias", "qk_norm", "sliding_window"}
_LATER |= {"rope_scaling", "norm_before_fc", "norm_before_residual", "target_head"}
"""Fields that checkpoints of older versions do not record."""

_TAKEN_OVER = (_LATER - {"rope_scaling"}) | {"fc_norm", "norm_output"}
_SCALED = ("llama3", "yarn", "linear", "dynamic")
"""RoPE types that a draft takes over from its target."""


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
                f"target_head needs the target's full vocabulary: set training.draft_vocab_size to "
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
    def of_identity(cls, fields: Mapping[str, Any], *, where: Path) -> Self:
        """Return the sizes that a checkpoint records (`identity`).

        Raises:
            MismatchError: it is of a newer version of Eyas, or not a draft's.

        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            raise MismatchError(
                f"{where} records a draft that this version of Eyas does not know ({name}: "
                f"{first['msg']}); use the version that wrote it"
            ) from error

    @classmethod
    def from_target(
        cls,
        target: PretrainedConfig,
        *,
        draft_vocab_size: int,
        settings: DraftSettings = PLAIN_DRAFT,
    ) -> Self:
        """Return the sizes of a draft; what `settings` leave open follows from the target.

        Where the target has no `rms_norm_eps`, the draft's is its `norm_eps`, `layer_norm_eps` or
        `layer_norm_epsilon`, else 1e-6.

        Raises:
            ConfigError: sizes contradict each other; names the settings.

        """
        size = settings.hidden_size or target.hidden_size
        if settings.target_head and size != target.hidden_size:
            raise ConfigError(
                f"draft.target_head needs a draft as wide as its target ({target.hidden_size}), "
                f"but draft.hidden_size is {size}; leave one of them out"
            )
        rope = _rope(target)
        return cls(
            **_attention_sizes(target, size, settings),
            hidden_size=size,
            target_hidden_size=target.hidden_size,
            intermediate_size=settings.intermediate_size
            or max(1, round(target.intermediate_size * size / target.hidden_size)),
            vocab_size=target.vocab_size,
            draft_vocab_size=target.vocab_size
            if settings.target_head
            else min(draft_vocab_size, target.vocab_size),
            rms_norm_eps=_norm_eps(target),
            rope_theta=float(rope.get("rope_theta", getattr(target, "rope_theta", 10000.0))),
            rope_scaling=_scaling(target, rope) if settings.rope_scaling == "target" else None,
            max_position_embeddings=target.max_position_embeddings,
            **settings.model_dump(include=_TAKEN_OVER),
        )


def _rope(target: PretrainedConfig) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = getattr(target, "rope_parameters", None) or {}
    # Models that mix attention types have one set for each.
    of_full: Mapping[str, Any] = rope.get("full_attention", rope)
    return of_full


def _scaling(target: PretrainedConfig, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the target's scaling; None, with a warning, for one that engines do not agree on."""
    kind = rope.get("rope_type", "default")
    if kind not in _SCALED:
        if kind != "default":
            logger.warning("the draft has a plain rotary embedding, and its target %s", kind)
        return None
    # A draft rotates all of a head.
    left_out = {"rope_theta", "partial_rotary_factor"}
    scaling = {name: value for name, value in rope.items() if name not in left_out}
    try:
        return checked_scaling(
            scaling,
            rope_theta=rope.get("rope_theta", 1e4),
            head_dim=2,
            max_position_embeddings=target.max_position_embeddings,
        )
    except ValueError as error:
        logger.warning("the draft has a plain rotary embedding, unlike its target: %s", error)
        return None


def _attention_sizes(
    target: PretrainedConfig, size: int, settings: DraftSettings
) -> dict[str, int]:
    own_heads = target.num_attention_heads
    head_dim = (
        settings.head_dim
        or getattr(target, "head_dim", None)
        or target.hidden_size // target.num_attention_heads
    )
    most = own_heads if size == target.hidden_size else max(1, size // head_dim)
    # Engines refuse a width that is no multiple of the heads, but for layers as Qwen3 has them.
    default = most if settings.qk_norm else _divisor_up_to(most, size)
    heads = settings.num_attention_heads or default
    if not settings.qk_norm and size % heads:
        raise ConfigError(
            f"a draft of width {size} cannot have {heads} query heads: engines refuse a width that "
            f"is no multiple of them; set draft.num_attention_heads to "
            f"{_divisor_up_to(heads, size)}, or another draft.hidden_size"
        )
    own_groups = getattr(target, "num_key_value_heads", None) or own_heads
    groups = settings.num_key_value_heads or _divisor_up_to(min(own_groups, heads), heads)
    if heads % groups:
        raise ConfigError(
            f"a draft cannot have {groups} key-value heads for {heads} query heads; set "
            f"draft.num_key_value_heads to a divisor of {heads}"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


def _divisor_up_to(most: int, number: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    return next(divisor for divisor in range(most, 0, -1) if number % divisor == 0)


def _norm_eps(target: PretrainedConfig) -> float:
    found = (getattr(target, name, None) for name in _NORM_EPS)
    return float(next((value for value in found if value is not None), 1e-6))
