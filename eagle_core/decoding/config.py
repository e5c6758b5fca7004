"""How text is decoded."""

from pydantic import ConfigDict, Field

from eagle_core.config_model import ConfigModel


class DecodingConfig(ConfigModel):
    """How text is decoded, plainly or speculatively."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    max_new_tokens: int = Field(
        default=64, gt=0, description="Most tokens generated for one prompt."
    )
    draft_tokens: int = Field(
        default=5, gt=0, le=32, description="K, tokens drafted for each forward of the target."
    )
    temperature: float = Field(
        default=0.0,
        ge=0.0,
        description="0 decodes greedily; above, tokens are sampled, and rejection sampling keeps "
        "the target's own distribution.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of sampling; unused at temperature 0.")
