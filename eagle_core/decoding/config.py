"""Settings of decoding."""

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from eagle_core.config_model import ConfigModel


class DecodingConfig(ConfigModel):
    """Settings of plain and speculative decoding."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    max_new_tokens: int = Field(default=64, gt=0, description="Maximum of new tokens per prompt.")
    draft_tokens: int = Field(
        default=5, gt=0, le=32, description="K, tokens drafted per forward of the target."
    )
    temperature: float = Field(
        default=0.0,
        ge=0.0,
        description="0 decodes greedily; above 0, tokens are sampled, and rejection sampling keeps "
        "the target's own distribution.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of sampling; unused at temperature 0. Every prompt has random numbers of "
        "its own, drawn from this and its tokens.",
    )


class TreeConfig(ConfigModel):
    """Settings of tree drafting."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    depth: int = Field(
        default=8, gt=0, le=32, description="Levels of the tree: most drafted tokens accepted."
    )
    top_k: int = Field(
        default=10,
        gt=0,
        le=64,
        description="Tokens of each level that are continued, each with as many tokens.",
    )
    nodes: int = Field(
        default=60,
        gt=0,
        le=1024,
        description="Drafted tokens that the target verifies in one forward: those whose paths the "
        "draft finds likeliest.",
    )

    @model_validator(mode="after")
    def _one_path_fits(self) -> Self:
        if self.nodes < self.depth:
            raise ValueError(
                f"a tree of {self.nodes} nodes holds no path of depth {self.depth}: raise `nodes` "
                "or lower `depth`"
            )
        return self
