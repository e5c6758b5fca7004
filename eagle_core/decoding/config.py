"""Settings of decoding."""

from pydantic import ConfigDict, Field

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
    seed: int = Field(default=0, ge=0, description="Seed of sampling; unused at temperature 0.")
