"""Configuration for regenerating the answers of a data set with the target."""

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from eagle_core.address import Address
from eagle_core.atomic_files import FOLDER_NAME
from eagle_core.config_model import ConfigModel
from eagle_core.decoding.sampling_limits import SamplingLimits
from eagle_core.serving.served import EngineName

_OF_A_SERVER = ("base_url", "model", "credentials")
_OF_VLLM = ("tool_parser", "reasoning_parser")
_OF_AN_ENGINE = ("context_tokens", *_OF_VLLM)
_OF_SAMPLING = ("top_p", "top_k")


class RegenerationConfig(ConfigModel):
    """Where and how the target answers, and the name of the new data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str | None = Field(
        default=None,
        description="Name of the new data set; empty means DATASET-by-TARGET.",
        pattern=FOLDER_NAME,
    )
    engine: EngineName | None = Field(
        default=None,
        description="An engine whose server is started for the run and ended with it. vllm: the "
        "one of target.vllm_python. llamacpp: llama-server as `eyas engines install llamacpp` "
        "builds it, else from PATH. Empty, like base_url, runs the target locally, one answer at a "
        "time.",
    )
    context_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens of the longest conversation that the engine holds, answers included. "
        "By default max_tokens and 6,144 more, but no more than the target has positions.",
    )
    tool_parser: str | None = Field(
        default=None,
        description="vLLM's parser of the target's tool calls, such as hermes or llama3_json; "
        "without one it refuses questions with tools. llama.cpp needs none.",
    )
    reasoning_parser: str | None = Field(
        default=None,
        description="vLLM's parser of the target's reasoning, such as qwen3 or deepseek_r1. "
        "Without one, the reasoning is what comes before </think>. llama.cpp needs none.",
    )
    base_url: Address | None = Field(
        default=None,
        description="An OpenAI-compatible server (vLLM, SGLang) that serves the target already, "
        "such as http://127.0.0.1:8000/v1.",
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
        default=32,
        gt=0,
        description="Conversations in flight on the server at a time. An engine keeps memory for "
        "so many; llama.cpp takes all of it at its start.",
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
    top_p: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Sample only the most likely tokens whose probabilities add up to this. Empty "
        "limits nothing, except by the defaults of a server at base_url.",
    )
    top_k: int | None = Field(
        default=None,
        gt=0,
        description="Sample only so many of the most likely tokens. Empty as for top_p; servers of "
        "OpenAI's own do not know it.",
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0.0,
        le=2.0,
        description="Divides the logits of tokens that were there before, 1.0 is none; also in "
        "greedy decoding. Empty as for top_p; servers of OpenAI's own do not know it.",
    )
    num_answers: int = Field(
        default=1,
        gt=0,
        description="Sampled answers per question: each conversation is answered so many times, as "
        "conversations of their own in the same split. Needs a temperature above 0.",
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

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.engine is not None:
            self._refuse(_OF_A_SERVER, "is for a server that runs already: remove it, or engine")
        else:
            self._refuse(_OF_AN_ENGINE, "is for an engine's server: set engine, or remove it")
        if self.engine == "llamacpp":
            self._refuse(_OF_VLLM, "is vLLM's: remove it, llama.cpp needs none")
        if not self.temperature:
            self._refuse(
                _OF_SAMPLING, "limits sampling, but temperature is 0: raise it, or remove this"
            )
            if self.num_answers > 1:
                raise ValueError(
                    f"num_answers is {self.num_answers}, but at temperature 0 all answers would be "
                    "equal: set regeneration.temperature above 0"
                )
        return self

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} {why}")

    def limits(self) -> SamplingLimits:
        """Return the limits of sampling; what is not set limits nothing."""
        return SamplingLimits(
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )

    def identity(self) -> dict[str, object]:
        """Return the fields that determine an answer.

        Fields that are not set are left out where earlier versions did not have them.
        """
        decisive = {"max_tokens", "cut_answers", "temperature", "thinking"}
        later = {"top_p", "top_k", "repetition_penalty", *_OF_VLLM}
        return (
            self.model_dump(mode="json", include=decisive)
            | self.model_dump(mode="json", include=later, exclude_none=True)
            | {"seed": self.seed if self.temperature else None}
        )

    def scope(self) -> dict[str, object]:
        """Return the fields that determine which answers there are, unless they are not set."""
        return self.model_dump(
            mode="json", include={"num_answers", "context_tokens"}, exclude_defaults=True
        )
