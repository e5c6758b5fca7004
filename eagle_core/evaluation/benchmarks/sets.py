"""The named benchmark sets: where they are on the hub, and how their records become questions.

A set is one file of a hub data set at a commit, with the columns that it has there. What is said
around a record's own text is ours: papers rarely print theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eagle_core.data.records.fields import is_list, parsed
from eagle_core.errors import ConfigError

BenchmarkName = Literal[
    "mt-bench", "humaneval", "gsm8k", "math-500", "alpaca", "cnn-dailymail", "speed-bench"
]

Record = Mapping[str, object]

PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
"""SPEED-Bench's own mark for a text that its licence does not let it contain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSet:
    """A set of questions on the hub."""

    repository: str
    revision: str
    """Commit."""
    file: str
    turns: Callable[[Record], list[str]]
    """What the user asks, turn after turn. Raises ConfigError for a record of another form."""
    is_categorised: bool = False
    """Whether its records have a category, over which the chosen questions are spread."""


def _text(record: Record, column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"expected text in the column `{column}`; it has {', '.join(record)}")
    return value


def _texts(*columns: str) -> Callable[[Record], list[str]]:
    """Return how to read a list of turns, in the first of `columns` that a record has."""

    def read(record: Record) -> list[str]:
        held = [parsed(record[column]) for column in columns if record.get(column) is not None]
        turns = held[0] if held else None
        if not is_list(turns) or not turns or not all(isinstance(turn, str) for turn in turns):
            names = " or ".join(f"`{column}`" for column in columns)
            raise ConfigError(f"expected a list of texts in {names}; it has {', '.join(record)}")
        return [str(turn) for turn in turns]

    return read


def _humaneval(record: Record) -> list[str]:
    code = _text(record, "prompt").strip("\n")
    return [f"Complete the following Python function.\n\n```python\n{code}\n```"]


def _alpaca(record: Record) -> list[str]:
    given = record.get("input")
    parts = [_text(record, "instruction"), given if isinstance(given, str) else ""]
    return ["\n\n".join(part for part in parts if part.strip())]


BENCHMARKS: Mapping[BenchmarkName, BenchmarkSet] = {
    "mt-bench": BenchmarkSet(
        repository="HuggingFaceH4/mt_bench_prompts",
        revision="e3a795c5e9a82ee40611c416b8a7786c73198991",
        file="raw/question.jsonl",
        turns=_texts("prompt", "turns"),  # FastChat's own file has `turns`
        is_categorised=True,
    ),
    "humaneval": BenchmarkSet(
        repository="openai/openai_humaneval",
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        file="openai_humaneval/test-00000-of-00001.parquet",
        turns=_humaneval,
    ),
    "gsm8k": BenchmarkSet(
        repository="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        file="main/test-00000-of-00001.parquet",
        turns=lambda record: [_text(record, "question")],
    ),
    "math-500": BenchmarkSet(
        repository="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        file="test.jsonl",
        turns=lambda record: [_text(record, "problem")],
    ),
    "alpaca": BenchmarkSet(
        repository="tatsu-lab/alpaca",
        revision="dce01c9b08f87459cf36a430d809084718273017",
        file="data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        turns=_alpaca,
    ),
    "cnn-dailymail": BenchmarkSet(
        repository="abisee/cnn_dailymail",
        revision="96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        file="3.0.0/test-00000-of-00001.parquet",
        turns=lambda record: [f"Summarize the following article.\n\n{_text(record, 'article')}"],
    ),
    "speed-bench": BenchmarkSet(
        repository="nvidia/SPEED-Bench",
        revision="487aa718444e816458d1a0a52bfce7a454285cf4",
        file="qualitative/test-00000-of-00001.parquet",
        turns=_texts("turns"),
        is_categorised=True,
    ),
}


def has_text(turns: Sequence[str]) -> bool:
    """Return whether no turn is SPEED-Bench's placeholder."""
    return not any(turn.strip() == PLACEHOLDER for turn in turns)
