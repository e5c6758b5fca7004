"""What the user says about answers that the target itself gives to a data set's questions."""

from typing import Literal

from pydantic import ConfigDict, Field

from eagle_core.address import Address
from eagle_core.atomic_files import FOLDER_NAME
from eagle_core.config_model import ConfigModel


class RegenerationConfig(ConfigModel):
    """Who answers, how, and what the data set of the answers is called."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str | None = Field(
        default=None,
        description="Name of the new data set; empty means DATASET-by-TARGET.",
        pattern=FOLDER_NAME,
    )
    base_url: Address | None = Field(
        default=None,
        description="An OpenAI-compatible server (vLLM, SGLang) that serves the target, such as "
        "http://127.0.0.1:8000/v1; empty runs the target here, one answer at a time.",
    )
    model: str | None = Field(
        default=None,
        description="What the server calls the target; empty means target.model.",
    )
    api_key_variable: str = Field(
        default="OPENAI_API_KEY",
        description="Environment variable with the server's API key, if it wants one.",
    )
    credentials: str | None = Field(
        default=None,
        description="Prefect Secret block that holds the API key, instead of the variable.",
    )
    concurrency: int = Field(
        default=32, gt=0, description="Conversations that the server is asked about at a time."
    )
    attempts: int = Field(
        default=6,
        gt=0,
        description="How often one question is asked before the server's errors count: with pauses "
        "that double and vary, about a minute altogether.",
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0, description="Longest wait for one answer (seconds)."
    )
    max_tokens: int = Field(
        default=2048, gt=0, description="Most tokens of one answer, reasoning included."
    )
    cut_answers: Literal["drop", "keep"] = Field(
        default="drop",
        description="What becomes of an answer that max_tokens cut: `keep` teaches the draft an "
        "end of turn that the target did not say.",
    )
    temperature: float = Field(
        default=0.0, ge=0.0, le=2.0, description="0 answers greedily; above, answers are sampled."
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of sampling; every answer gets its own, made of this and its place.",
    )
    thinking: bool | None = Field(
        default=None,
        description="Whether the target reasons first, where its template has a choice (sent as "
        "chat_template_kwargs); empty leaves it to the template.",
    )

    def identity(self) -> dict[str, object]:
        """Return the fields that decide what is answered."""
        decisive = {"max_tokens", "cut_answers", "temperature", "thinking"}
        return self.model_dump(mode="json", include=decisive) | {
            "seed": self.seed if self.temperature else None
        }
