"""`regenerate`: the target itself answers a data set's questions.

This is the largest lever on acceptance: the draft then learns the target's own answers.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefect import flow, task
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import task_run
from prefect.settings import PREFECT_API_URL

from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.data.manifest import DatasetManifest
from eagle_core.data.writer import LEDGER_NAME
from eagle_core.errors import ConfigError, TransientError
from eagle_core.regeneration.answers import AnswerSource
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.engine_answers import EngineAnswers
from eagle_core.regeneration.generation_prompt import served_target_opens_reasoning
from eagle_core.regeneration.journal import FinishedConversation
from eagle_core.regeneration.local import LocalAnswers
from eagle_core.regeneration.past_end import special_tokens
from eagle_core.regeneration.regenerate import Regenerated, Regeneration
from eagle_core.regeneration.server import AnswerServer
from eagle_core.target.config import TargetConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.progress import stage_progress
from flows.orchestration.retry import is_transient
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports.table import Row
from flows.summaries import DatasetSummary
from flows.tasks.prepare import check_runnable, prepare_dataset, prepare_weights
from flows.workspace import DEFAULT_HOME, Workspace

_RETRY_SECONDS = (30, 300)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegenerateSummary:
    """The new data set, and the figures of its regeneration."""

    name: str
    path: Path
    fingerprint: str
    num_conversations: int
    """Of the source, each as often as it is answered: train + held out + dropped."""
    num_train: int
    num_held_out: int
    dropped: Mapping[str, int]
    """By reason."""
    changed: Mapping[str, int]
    """Kept, but ended early; by reason."""
    num_asked: int
    """Conversations that this run sent; the others were answered before."""
    num_answered: int
    """Of these, with a new answer."""
    num_tokens: int
    """Tokens of this run's answers."""
    seconds: float
    examples: Mapping[str, str] = field(default_factory=dict)
    """A detail, such as the server's words, for every reason to drop; empty if none was asked."""

    @property
    def ledger_path(self) -> Path:
        """The file that lists every dropped or changed conversation."""
        return self.path / LEDGER_NAME


@flow(
    name="regenerate",
    flow_run_name=run_name("regenerate-{target.name}-{dataset.name}"),
    persist_result=False,
)
def regenerate_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    regeneration: RegenerationConfig = RegenerationConfig(),
    home: str = DEFAULT_HOME,
) -> RegenerateSummary:
    """Answer the questions of `dataset` that the target has not answered; write a data set.

    A retry, or a run over more questions, sends no question twice. Questions that the server
    refused or failed to answer are in the ledger; the next run sends them again.

    Raises:
        TransientError: the server is unreachable; finished answers are kept.
        ConfigError: the server refuses key, model or every question, the engine is not installed
            or cannot serve the target, or another data set has the name.

    """
    started = time.monotonic()
    name = regeneration.name or f"{dataset.name}-by-{target.name}"
    source = Workspace.at(home, target=target.name, dataset=dataset.name)
    space = Workspace.at(home, target=target.name, dataset=name)
    if regeneration.base_url is None:  # else a server has the weights
        prepare_weights(target)
        check_runnable(target, runs_here=regeneration.engine is None, captured=None)
    if regeneration.engine is not None:
        EngineAnswers(target, regeneration)  # refuses what it cannot serve, before data is read
    questions = prepare_dataset(dataset, source, questions_suffice=True)
    done = answer_all(target, regeneration, questions, space)
    summary = _summary(done, space, seconds=time.monotonic() - started)
    title = f"Answers of {target.name} to {dataset.name}"
    rows = summary_rows(summary)
    report_stage(title, rows, key=artifact_key("regenerate", target.name, dataset.name))
    return summary


@task(
    task_run_name="answers of {target.name}",
    retries=len(_RETRY_SECONDS),
    retry_delay_seconds=list(_RETRY_SECONDS),
    retry_condition_fn=is_transient,  # a server that ended; a wrong key is not retried
    cache_policy=NO_CACHE,  # only the journal knows what is answered
    persist_result=False,
)
def answer_all(
    target: TargetConfig,
    config: RegenerationConfig,
    questions: DatasetSummary,
    space: Workspace,
) -> Regenerated:
    """Send the questions that the journal does not hold, then write the data set."""
    log = get_run_logger()
    regeneration = Regeneration(
        config,
        answer_source(target, config),
        source=questions.path,
        out_dir=space.dataset_path,
    )
    log.info("answers are kept in %s", regeneration.journal_path)
    total = (questions.num_train + questions.num_held_out) * config.num_answers
    key = artifact_key("answers-progress", space.target, space.dataset)
    with stage_progress("answers", key=key, total=total, unit="conversations") as progress:
        try:
            done = regeneration.run(
                on_finished=lambda finished: progress.advance(note=_note(finished))
            )
        except TransientError as error:
            _announce_retry(error)
            raise
        progress.move_to(total)
    return done


def _announce_retry(error: TransientError) -> None:
    """Say why nothing happens until the next attempt."""
    attempt = task_run.run_count or 1
    if attempt <= len(_RETRY_SECONDS):
        seconds = _RETRY_SECONDS[attempt - 1]
        get_run_logger().warning("%s; the next attempt is in %d seconds", error, seconds)


def answer_source(target: TargetConfig, config: RegenerationConfig) -> AnswerSource:
    """Return the server that the settings name, or the target itself.

    Raises:
        ConfigError: the Prefect block with the API key does not exist, or the engine is not
            installed or cannot serve the target.

    """
    if config.engine is not None:
        return EngineAnswers(target, config)
    if config.base_url is None:
        return LocalAnswers(target, config)
    return AnswerServer(
        config,
        model=config.model or target.model,
        api_key=_api_key(config),
        special_tokens=special_tokens(target),
        opens_reasoning=config.cut_answers == "keep"
        and served_target_opens_reasoning(target, thinking=config.thinking),
    )


def summary_rows(summary: RegenerateSummary) -> list[Row]:
    """Return the figures, and the next command."""
    use = f"--set dataset.name={summary.name} --set dataset.source={REGENERATED}"
    return [
        ("conversations", f"{summary.num_conversations:,}"),
        ("asked in this run", f"{summary.num_asked:,}"),
        ("answered in this run", f"{summary.num_answered:,}"),
        ("answer tokens, this run", f"{summary.num_tokens:,}"),
        ("kept", f"{summary.num_train + summary.num_held_out:,}"),
        ("conversations to train on", f"{summary.num_train:,}"),
        ("held out", f"{summary.num_held_out:,}"),
        *_dropped_rows(summary),
        *((f"changed: {change}", f"{count:,}") for change, count in summary.changed.items()),
        ("ledger", str(summary.ledger_path)),
        ("data set", str(summary.path)),
        ("fingerprint", summary.fingerprint),
        ("train on it", f"eyas run offline RECIPE {use}"),
        ("seconds", f"{summary.seconds:.1f}"),
    ]


def _dropped_rows(summary: RegenerateSummary) -> Iterator[Row]:
    yield "dropped", f"{sum(summary.dropped.values()):,}"
    for reason, count in summary.dropped.items():
        example = summary.examples.get(reason)
        yield f"dropped: {reason}", f"{count:,}" + (f", such as {example}" if example else "")


def _summary(done: Regenerated, space: Workspace, *, seconds: float) -> RegenerateSummary:
    manifest: DatasetManifest = done.manifest
    return RegenerateSummary(
        name=manifest.name,
        path=space.dataset_path,
        fingerprint=manifest.fingerprint,
        num_conversations=manifest.num_records,
        num_train=manifest.num_train,
        num_held_out=manifest.num_held_out,
        dropped=manifest.dropped,
        changed=manifest.changed,
        num_asked=done.num_asked,
        num_answered=done.num_answered,
        num_tokens=done.num_tokens,
        seconds=seconds,
        examples=done.examples,
    )


def _note(finished: FinishedConversation) -> str:
    return str(finished.failure or "")


def _api_key(config: RegenerationConfig) -> str | None:
    if config.credentials is None:
        return os.environ.get(config.api_key_variable)
    try:
        found = Secret.load(config.credentials).get()  # type: ignore[union-attr]  # a flow is not a coroutine
    except ValueError as error:  # how Prefect reports a missing block
        raise ConfigError(
            f"regeneration.credentials: the server at {PREFECT_API_URL.value() or 'this process'} "
            f"has no Prefect block secret/{config.credentials}; docs/guides/own-data.md shows how "
            "to create it"
        ) from error
    return str(found)
