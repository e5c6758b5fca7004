"""How a draft is evaluated."""

from pydantic import Field

from eagle_core.address import Address
from eagle_core.decoding.config import DecodingConfig
from eagle_core.draft.config import CheckpointChoice


class EvaluationConfig(DecodingConfig):
    """How a draft is evaluated."""

    checkpoint: CheckpointChoice = Field(
        default="best",
        description="best: the checkpoint with the longest held-out acceptance, which is the one "
        "that export serves, or the newest where nothing was held out.",
    )
    prompts: Address | None = Field(
        default=None,
        description="Questions to ask instead of the held-out conversations: JSON, JSON lines, "
        "Parquet or CSV at a path or URL, or hf:ORG/NAME, with turns, messages or a column such as "
        "prompt or question; the report groups by their category.",
    )
    max_turns: int = Field(
        default=1,
        gt=0,
        description="First assistant turns of each held-out conversation that are asked for; later "
        "ones keep the data's own earlier answers. The report groups by turn.",
    )
    num_prompts: int = Field(
        default=16, gt=0, description="Prompts that are decoded speculatively."
    )
    num_plain_prompts: int | None = Field(
        default=None,
        ge=0,
        description="Of these, the first ones that are decoded plainly too, to compare tokens and "
        "speed; empty means all, 0 none (which takes less than half the time).",
    )
    max_prompt_tokens: int = Field(
        default=1024, gt=0, description="Longer prompts are left out, not cut."
    )
    batch_prompts: int = Field(
        default=1,
        gt=0,
        description="Prompts that are decoded side by side: the texts are the same, and the whole "
        "takes less time. 1 measures the speed that one user sees; targets with sliding windows "
        "take no more.",
    )
