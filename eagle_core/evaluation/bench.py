"""What `bench` sweeps, and the evaluation that this is."""

from typing import Annotated, Literal

from pydantic import Field

from eagle_core.config_model import ConfigModel
from eagle_core.evaluation.config import DraftProbability, EvaluationConfig
from eagle_core.serving.served import EngineName

BenchEngine = Literal["auto", "vllm", "llamacpp"]


class BenchConfig(ConfigModel):
    """What is swept to find out how to serve a draft; the prompts are those of `evaluation`."""

    engine: BenchEngine = Field(
        default="auto",
        description="What decodes. auto: evaluation.engine, if that is an engine, else the one "
        "that is installed here; of both, vLLM on a GPU and llama.cpp on a CPU.",
    )
    draft_lengths: tuple[Annotated[int, Field(gt=0, le=32)], ...] = Field(
        default=(1, 2, 3, 4, 5), min_length=1, description="Numbers of drafted tokens per round."
    )
    concurrency: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(1, 4, 16),
        min_length=1,
        description="Prompts decoded at a time; 1 always is measured. No more than there are "
        "prompts.",
    )
    draft_p_min: tuple[DraftProbability, ...] = Field(
        default=(0.0, 0.5, 0.75),
        min_length=1,
        description="Probabilities below which drafting stops in a round, each with every draft "
        "length. llama.cpp's alone: vLLM has none.",
    )


def swept(bench: BenchConfig, evaluation: EvaluationConfig, engine: EngineName) -> EvaluationConfig:
    """Return an evaluation on an engine, with the sweep of `bench`, which drafts chains.

    Its acceptance results are those of `evaluation.draft_tokens` if that is swept, else of the
    largest draft length.
    """
    lengths = sorted(set(bench.draft_lengths))
    is_swept = evaluation.draft_tokens in lengths
    own = {
        "engine": engine,
        "tree": None,
        "draft_tokens": evaluation.draft_tokens if is_swept else lengths[-1],
        "draft_lengths": tuple(lengths),
        "concurrency": bench.concurrency,
        "draft_p_min": bench.draft_p_min if engine == "llamacpp" else (0.0,),
    }
    return EvaluationConfig.model_validate(evaluation.model_dump() | own)
