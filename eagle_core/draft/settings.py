"""How a draft is built: the section `draft` of a recipe."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from eagle_core.config_model import ConfigModel

RopeChoice = Literal["target", "none"]


class DraftSettings(ConfigModel):
    """What sets a draft apart from one plain layer as wide as the target.

    A run keeps the draft that it began with. Not every engine loads every variant: see
    docs/guides/serving.md.
    """

    num_hidden_layers: int = Field(
        default=1,
        ge=1,
        le=4,
        description="Decoder layers. Each makes the draft better and every drafted token slower; "
        "llama.cpp loads drafts of one layer only.",
    )
    hidden_size: int | None = Field(
        default=None,
        gt=0,
        description="Width of the draft; by default the target's. A draft of another width brings "
        "its own embedding, made from the target's.",
    )
    intermediate_size: int | None = Field(
        default=None,
        gt=0,
        description="Width of the feed-forward block; by default as wide for the draft's width as "
        "the target's is for its own.",
    )
    num_attention_heads: int | None = Field(
        default=None,
        gt=0,
        description="Query heads; by default the target's, or as many as fill another width.",
    )
    num_key_value_heads: int | None = Field(
        default=None,
        gt=0,
        description="Key-value heads, a divisor of the query heads; by default the target's, or "
        "the next smaller number that divides.",
    )
    head_dim: int | None = Field(
        default=None,
        gt=0,
        multiple_of=2,
        description="Size of a head; by default the target's.",
    )
    attention_bias: bool = Field(
        default=False, description="Biases of the query, key, value and output projections."
    )
    mlp_bias: bool = Field(default=False, description="Biases of the feed-forward block.")
    qk_norm: bool = Field(
        default=False, description="RMSNorm of the queries and keys of each head, as in Qwen3."
    )
    norm_before_fc: bool = Field(
        default=False, description="One RMSNorm over all three aux states before fusing them."
    )
    fc_norm: bool = Field(
        default=False, description="EAGLE-3.1: normalise each aux state before fusing them."
    )
    norm_output: bool = Field(
        default=False, description="EAGLE-3.1: feed the final norm's output back to the draft."
    )
    norm_before_residual: bool = Field(
        default=False,
        description="Start the residual stream at the normed hidden state, as drafts of the "
        "speculators library do.",
    )
    target_head: bool = Field(
        default=False,
        description="Use the target's own output head, frozen, over its full vocabulary: nothing "
        "of it is trained or exported. `training.draft_vocab_size` has no effect then.",
    )
    sliding_window: int | None = Field(
        default=None,
        gt=0,
        description="W: a token sees itself and the W - 1 tokens before it. Holds acceptance on "
        "contexts much longer than those of training, and bounds memory; by default all.",
    )
    rope_scaling: RopeChoice = Field(
        default="target",
        description="target: scale the rotary embedding as the target does (llama3, yarn, linear "
        "or dynamic); none: never.",
    )

    @model_validator(mode="after")
    def _require_known_layer(self) -> Self:
        if self.qk_norm and self.mlp_bias:
            raise ValueError(
                "qk_norm and mlp_bias do not go together: engines compute drafts with qk_norm as "
                "Qwen3 layers, whose feed-forward block has no biases; set one of them to false"
            )
        return self

    def with_moved(self, moved: Mapping[str, bool]) -> Self:
        """Return these settings with flags that older recipes set in another section."""
        return self.model_copy(update={name: True for name, is_set in moved.items() if is_set})


PLAIN_DRAFT = DraftSettings()
