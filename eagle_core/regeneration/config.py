"""Configuration for regenerating the answers of a data set with the target."""

from typing import Literal

from pydantic import ConfigDict, Field

from eagle_core.address import Address
from eagle_core.atomic_files import FOLDER_NAME
from eagle_core.config_model import ConfigModel


class RegenerationConfig(ConfigModel):
    """Where and how the target answers, and the name of the new data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str | None = Field(
        default=None,
        description="Name of the new data set; empty means DATASET-by-TARGET.",
        pattern=FOLDER_NAME,
    )
    base_url: Address | None = Field(
        default=None,
        description="An OpenAI-compatible server (vLLM, SGLang) that serves the target, such as "
        "http://127.0.0.1:8000/v1; empty runs the target locally, one answer at a time.",
    )
    model: str | None = Field(
        default=None,
        description="Model name of the target on the server; empty means target.model.",
    )
    api_key_variable: str = Field(
        default="OPENAI_API_KEY",
        description="Environment variable with the server's API key, if it needs one.",
    )
    credentials: str | None = Field(
        default=None,
        description="Prefect Secret block that holds the API key, instead of the variable.",
    )
    concurrency: int = Field(
        default=32, gt=0, description="Conversations in flight on the server at a time."
    )
    attempts: int = Field(
        default=6,
        gt=0,
        description="Attempts per question before a server error counts; the pauses between them "
        "double, with jitter, and take about a minute in total.",
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0, description="Longest wait for one answer (seconds)."
    )
    max_tokens: int = Field(
        default=2048, gt=0, description="Maximum tokens per answer, reasoning included."
    )
    cut_answers: Literal["drop", "keep"] = Field(
        default="drop",
        description="What to do with an answer that max_tokens truncated: `keep` teaches the draft "
        "an end of turn that the target did not generate. Reasoning without an answer is dropped.",
    )
    temperature: float = Field(
        default=0.0, ge=0.0, le=2.0, description="0 decodes greedily; higher values sample."
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Sampling seed; each answer's seed is derived from it, conversation and turn.",
    )
    thinking: bool | None = Field(
        default=None,
        description="Whether the target reasons first, if its template supports a choice (sent as "
        "chat_template_kwargs); empty leaves it to the template.",
    )

    def identity(self) -> dict[str, object]:
        """Return the fields that determine the answers."""
        decisive = {"max_tokens", "cut_answers", "temperature", "thinking"}
        return self.model_dump(mode="json", include=decisive) | {
            "seed": self.seed if self.temperature else None
        }
