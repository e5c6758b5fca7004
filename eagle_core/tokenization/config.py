"""What the user says about how conversations are written for the target model."""

import datetime as dt
from typing import Literal

from pydantic import Field

from eagle_core.config_model import ConfigModel


class TemplateConfig(ConfigModel):
    """How conversations are written for the target model."""

    chat_template: str | None = Field(
        default=None,
        description=(
            "Instead of the tokenizer's own template: Jinja text, or `plain` for base models "
            "(headings and the end-of-text token, no further special tokens)"
        ),
    )
    enable_thinking: bool | None = Field(
        default=None,
        description=(
            "Whether the generation prompt asks for reasoning, where a template has a choice; "
            "empty asks for it exactly before answers that have some"
        ),
    )
    reasoning: Literal["keep", "drop"] = Field(
        default="keep", description="Whether the assistant's reasoning is part of its answers"
    )
    last_turn_only: bool = Field(
        default=False, description="Supervise the last assistant turn only, not all of them"
    )
    date: dt.date = Field(
        default=dt.date(2024, 7, 26),
        description="What templates that print today's date print, so that tokens never change",
    )
