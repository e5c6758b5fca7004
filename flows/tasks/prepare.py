"""The stages before the target model: conversations, then tokens, each run once per content."""

import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.data.build import build_dataset
from eagle_core.data.config import DatasetConfig
from eagle_core.data.writer import LEDGER_NAME
from eagle_core.errors import ConfigError
from eagle_core.evaluation.benchmarks.question_file import QuestionFile
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.serving.engines import find_engine
from eagle_core.target.config import TargetConfig
from eagle_core.target.placement import why_not_decoded
from eagle_core.target.preflight import CapturedWhere, check_description, check_weights
from eagle_core.target.tree_attention import require_tree_masks
from flows.bridge.draft_setup import require_draft_sizes
from flows.bridge.passed_checks import TargetCheck, require_passed
from flows.bridge.token_files import known_tokens
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.progress import stage_progress
from flows.reports.counts import MUCH, counts_text
from flows.summaries import DatasetSummary, TokensSummary
from flows.tasks.tokenize import tokenize
from flows.workspace import Workspace


def prepare(
    target: TargetConfig,
    dataset: DatasetConfig,
    home: str,
    *,
    capture: CapturedWhere = None,
) -> tuple[Workspace, TokensSummary]:
    """Prepare weights, conversations and tokens for all later stages.

    With `capture`, the place where the target will run on the tokens, it is checked first.
    """
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    prepare_weights(target)
    if capture is not None:
        here = capture == "here"
        check_runnable(target, max_length=dataset.max_length, runs_here=here, captured=capture)
    prepare_dataset(dataset, space)
    return space, tokenize(target, dataset, space)


def prepare_undownloaded(
    target: TargetConfig, dataset: DatasetConfig, home: str
) -> tuple[Workspace, TokensSummary]:
    """Prepare conversations and tokens for a target of which only the description is here."""
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    check_description(target, max_length=dataset.max_length)
    require_draft_sizes(target)
    prepare_dataset(dataset, space)
    return space, tokenize(target, dataset, space)


@task(task_run_name="dataset {config.name}", cache_policy=NO_CACHE, persist_result=False)
def prepare_dataset(
    config: DatasetConfig, space: Workspace, *, questions_suffice: bool = False
) -> DatasetSummary:
    """Read, normalise, deduplicate and split the conversations, unless already done.

    With `questions_suffice` conversations may lack answers: the target will give its own.
    """
    started = time.monotonic()
    key = artifact_key("dataset-progress", space.dataset)
    with stage_progress("data set", key=key, total=100, unit="%") as progress:
        manifest = build_dataset(
            config,
            out_dir=space.dataset_path,
            questions_suffice=questions_suffice,
            progress=lambda share, what: progress.move_to(int(100 * share), note=what),
        )
    summary = DatasetSummary(
        path=space.dataset_path,
        fingerprint=manifest.fingerprint,
        num_records=manifest.num_records,
        num_train=manifest.num_train,
        num_held_out=manifest.num_held_out,
        dropped=manifest.dropped,
        changed=manifest.changed,
        unread=manifest.unread,
        by_source=manifest.by_source,
        ledger_path=space.dataset_path / LEDGER_NAME,
        seconds=time.monotonic() - started,
    )
    _report_dataset(summary)
    return summary


def _report_dataset(summary: DatasetSummary) -> None:
    """Log what was kept and what was not; warn if much was dropped."""
    log = get_run_logger()
    log.info(
        "%s records: %s to train on, %s held out, %s dropped; ledger: %s",
        *(f"{summary.num_records:,}", f"{summary.num_train:,}", f"{summary.num_held_out:,}"),
        *(f"{summary.num_dropped:,}", summary.ledger_path),
    )
    for what, counts in (("changed", summary.changed), ("fields not read", summary.unread)):
        if counts:
            log.info("%s: %s", what, counts_text(counts))
    if summary.dropped_share > MUCH:
        log.warning(
            "%.0f %% of the records of this data set are dropped: %s; %s says which",
            *(100 * summary.dropped_share, counts_text(summary.dropped), summary.ledger_path),
        )
    elif summary.dropped:
        log.info("dropped: %s", counts_text(summary.dropped))


@task(task_run_name="weights of {target.name}", cache_policy=NO_CACHE, persist_result=False)
def prepare_weights(target: TargetConfig) -> Path:
    """Find the target's weights, or fetch or convert them once, before all other work.

    Only the headers of the files are read: enough for stages that do not run the target.

    Raises:
        ConfigError: they are missing and cannot be fetched; names the download and its folder.
        CorruptError: a file is empty, cut or a Git LFS pointer; names it.

    """
    key = artifact_key("weights", target.name)
    with stage_progress("target weights", key=key, total=1, unit="model") as progress:
        folder = check_weights(target)
        progress.advance()
    return folder


@task(task_run_name="check of {target.name}", cache_policy=NO_CACHE, persist_result=False)
def check_runnable(
    target: TargetConfig,
    *,
    max_length: int | None = None,
    runs_here: bool = True,
    rolls_back: bool = False,
    captured: CapturedWhere = "here",
) -> None:
    """Refuse within seconds what would fail after hours: see `check_target` for the arguments.

    A check that passed in this process is not repeated, unless a file of the target has changed.

    Raises:
        ConfigError: this target cannot be run, or no draft can be made for it; names the cause.
        CorruptError: its weights are incomplete; names the tensors.

    """
    require_passed(
        TargetCheck(
            target=target,
            max_length=max_length,
            runs_here=runs_here,
            rolls_back=rolls_back,
            captured=captured,
        )
    )


def is_evaluated(target: TargetConfig, evaluation: EvaluationConfig) -> bool:
    """Return whether evaluation can follow; if this machine cannot decode the target, warn.

    The files of benchmark sets are found, or downloaded, now and not after training.

    Raises:
        ConfigError: an engine is to decode, and is not installed; a benchmark's file is missing;
            or the target's attention takes no mask of a tree.
        TransientError: the hub is unreachable, and a benchmark's file is not in its cache.

    """
    if evaluation.engine != "eyas":
        find_engine(evaluation.engine, target)
    elif obstacle := why_not_decoded(target):
        get_run_logger().warning("target %s is not evaluated: %s", target.name, obstacle)
        return False
    if evaluation.tree is not None:
        require_tree_masks(target.name, target.attention)
    for benchmark in evaluation.benchmark_sets:
        QuestionFile.find(benchmark)
    return True


def tokens_of_run(
    target: TargetConfig, dataset: DatasetConfig, space: Workspace, run: str, content: str
) -> TokensSummary:
    """Return the token files that a run started with, rebuilt if necessary.

    Raises:
        ConfigError: they are gone, and their data set, template or max_length has changed since.

    """
    tokens = known_tokens(target, space, content)
    if tokens is not None:
        return tokens
    tokens = prepare(target, dataset, str(space.home))[1]
    if tokens.content != content:
        raise ConfigError(
            f"the token files of run {run} are gone ({space.token_file('train', content)}), and "
            "its data set, template or max_length has changed since: restore them, or train "
            "another run (--run)"
        )
    return tokens
