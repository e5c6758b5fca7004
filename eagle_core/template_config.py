"""What the user says about how conversations are written for the target model."""

import datetime as dt

from pydantic import BaseModel, ConfigDict, Field


class TemplateConfig(BaseModel):
    """How conversations are written for the target model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chat_template: str | None = Field(
        default=None, description="Jinja text instead of the tokenizer's own template"
    )
    enable_thinking: bool | None = Field(
        default=None,
        description="Passed to the template: whether it asks for reasoning; empty passes nothing",
    )
    last_turn_only: bool = Field(
        default=False, description="Supervise the last assistant turn only, not all of them"
    )
    date: dt.date = Field(
        default=dt.date(2024, 7, 26),
        description="What templates that print today's date print, so that tokens never change",
    )
