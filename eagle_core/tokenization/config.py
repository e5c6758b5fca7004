"""Configuration of how conversations are rendered for the target model."""

import datetime as dt
from typing import Literal

from pydantic import Field

from eagle_core.config_model import ConfigModel


class TemplateConfig(ConfigModel):
    """How conversations are rendered for the target model."""

    chat_template: str | None = Field(
        default=None,
        description=(
            "Replaces the tokenizer's template: Jinja text, or `plain` for base models (headings "
            "and the end-of-text token, no other special tokens)"
        ),
    )
    enable_thinking: bool | None = Field(
        default=None,
        description=(
            "Whether the generation prompt requests reasoning, if the template supports a choice; "
            "empty requests it only before answers that have some"
        ),
    )
    reasoning: Literal["keep", "drop"] = Field(
        default="keep", description="Whether the assistant's reasoning is part of its answers"
    )
    last_turn_only: bool = Field(
        default=False, description="Supervise only the last assistant turn instead of all"
    )
    date: dt.date = Field(
        default=dt.date(2024, 7, 26),
        description="Date for templates that print today's date, so that tokens never change",
    )
