"""The files behind a run's report: the settings of the newest attempt, and every result.

All are JSON files in the run's folder. A stage that has not ended has no file.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar, get_args

import numpy as np
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import to_json

from eagle_core.atomic_files import write_text
from eagle_core.evaluation.config import EvaluationEngine
from eagle_core.serving.served import EngineName
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.run import Run
from flows.summaries import EstimateSummary, EvaluateSummary, TokensSummary, TrainSummary
from storage.records.commits import Commits
from storage.store import Store

SETTINGS_NAME = "settings.json"
TRAINING_NAME = "training.json"
EVALUATION_NAME = "evaluation.json"
ESTIMATE_NAME = "estimate.json"
REPORT_NAME = "report.html"
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
_LENGTH_BINS = 24

Stage = TypeVar("Stage")


class SourceFigures(BaseModel):
    """What one of several sources gave to a split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_samples: int
    num_supervised: int


class SplitFigures(BaseModel):
    """The figures of one split of the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_samples: int
    num_tokens: int
    num_supervised: int
    length_edges: tuple[int, ...]
    """[B + 1] in tokens, from the shortest sample to the longest."""
    length_counts: tuple[int, ...]
    """[B] samples between two edges."""
    by_source: dict[str, SourceFigures] = Field(default_factory=dict)
    """Empty unless the data set has several sources, and in files of older versions."""

    @classmethod
    def of(cls, tokens: TokenFile, *, without: Collection[str] = ()) -> "SplitFigures":
        """Count the samples of a token file, except those of `without`."""
        omitted = [name for name in without if name in tokens]
        is_counted = np.ones(len(tokens), dtype=np.bool_)
        if omitted:
            is_counted = ~np.isin(tokens.sample_ids, omitted)
        lengths, supervised = tokens.lengths[is_counted], tokens.supervised_lengths * is_counted
        last = int(lengths.max()) + 1 if len(lengths) else 1
        first = int(lengths.min()) if len(lengths) else 0
        num_bins = max(1, min(_LENGTH_BINS, last - first))
        counts, edges = np.histogram(lengths, np.linspace(first, last, num_bins + 1).astype(int))
        return cls(
            num_samples=len(lengths),
            num_tokens=int(lengths.sum()),
            num_supervised=int(supervised.sum()),
            length_edges=tuple(edges.tolist()),
            length_counts=tuple(counts.tolist()),
            by_source={
                name: SourceFigures(
                    num_samples=int(is_counted[rows].sum()),
                    num_supervised=int(supervised[rows].sum()),
                )
                for name, rows in tokens.rows_by_source().items()
            },
        )


class StorageSize(BaseModel):
    """The size of a store's states, and their size as raw arrays."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str
    profile: str
    num_shards: int
    num_tokens: int
    raw_bytes: int
    stored_bytes: int

    @classmethod
    def of(cls, store: Store, commits: Commits | None = None) -> "StorageSize":
        """Add up the commit records of a store; with `commits` they are not read again."""
        totals = (store.commits() if commits is None else commits).totals
        return cls(
            root=store.root.url,
            profile=store.identity.profile,
            num_shards=totals.num_shards,
            num_tokens=totals.num_tokens,
            raw_bytes=totals.raw_bytes,
            stored_bytes=totals.stored_bytes,
        )


class RunSettings(BaseModel):
    """The settings of a run, written before its first step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    source_id: str
    configuration: dict[str, dict[str, JsonValue]]
    """Section to key to value, for display."""
    train: SplitFigures
    held_out: SplitFigures
    storage_size: Annotated[
        StorageSize | None, Field(validation_alias=AliasChoices("storage_size", "bill"))
    ]
    """None for a run that stores nothing."""
    total_steps: int | None = None
    """Planned steps of the attempt; None in files of older versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """Everything a run's report is made from; None for a stage that has not ended."""

    settings: RunSettings | None
    training: TrainSummary | None
    evaluation: EvaluateSummary | None
    estimate: EstimateSummary | None
    by_engine: tuple[EvaluateSummary, ...]
    """What engines made of it: the last evaluation by each."""
    outdated: tuple[str, ...]
    """Names of files that another version of Eyas wrote: they count as absent."""

    @classmethod
    def read(cls, run_path: Path) -> "RunRecord":
        """Read the files that exist."""
        outdated: list[str] = []

        def read(name: str, kind: type[Stage]) -> Stage | None:
            try:
                return TypeAdapter(kind).validate_json((run_path / name).read_bytes())
            except FileNotFoundError:
                return None
            except ValidationError:
                outdated.append(name)
                return None

        return cls(
            settings=read(SETTINGS_NAME, RunSettings),
            training=read(TRAINING_NAME, TrainSummary),
            evaluation=read(EVALUATION_NAME, EvaluateSummary),
            estimate=read(ESTIMATE_NAME, EstimateSummary),
            by_engine=tuple(
                found
                for engine in ENGINES
                if (found := read(evaluation_name(engine), EvaluateSummary)) is not None
            ),
            outdated=tuple(outdated),
        )


def evaluation_name(engine: EvaluationEngine) -> str:
    """Return the file of an evaluation: that of an engine does not replace Eyas's own."""
    return EVALUATION_NAME if engine == "eyas" else f"evaluation-{engine}.json"


def write_settings(
    run_path: Path,
    run: Run,
    tokens: TokensSummary,
    storage_size: StorageSize | None,
    *,
    total_steps: int,
    excluded: Collection[str] = (),
) -> None:
    """Write the settings of this attempt for display; split figures leave `excluded` out."""
    sections = ("target", "dataset", "store", "training", "tracking")
    settings = RunSettings(
        title=run.title,
        source_id=run.source_id,
        configuration={name: getattr(run, name).model_dump(mode="json") for name in sections},
        train=SplitFigures.of(TokenFile(tokens.train_path), without=excluded),
        held_out=SplitFigures.of(TokenFile(tokens.held_out_path), without=excluded),
        storage_size=storage_size,
        total_steps=total_steps,
    )
    write_text(run_path / SETTINGS_NAME, settings.model_dump_json(indent=2) + "\n")


def write_stage(path: Path, summary: TrainSummary | EvaluateSummary | EstimateSummary) -> None:
    """Write a stage's result as strict JSON: a missing figure is null, not NaN."""
    document = to_json(summary, indent=2, inf_nan_mode="null").decode()
    write_text(path, document + "\n")


def as_text(value: JsonValue) -> str:
    """Return a setting as a recipe would write it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(as_text, value)) or "none"
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
