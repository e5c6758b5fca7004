"""The stages before the target model: conversations, then tokens, each run once per content."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.data.manifest import load_manifest
from eagle_core.data.writer import LEDGER_NAME, Split
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.parallel import tokenize_in_processes
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from flows.bridge.token_files import content_name, known_tokens, tokens_summary
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_markdown, publish_plot
from flows.orchestration.best_effort import best_effort
from flows.orchestration.progress import StageProgress, stage_progress
from flows.reports.token_report import page_path, write_token_report
from flows.summaries import DatasetSummary, TokensSummary
from flows.workspace import Workspace

_CONVERSATIONS_PER_PROCESS = 4000
_MUCH = 0.1
"""Share of records dropped from which on a warning says so."""
_MAX_NAMES = 12


def prepare(
    target: TargetConfig, dataset: DatasetConfig, home: str
) -> tuple[Workspace, TokensSummary]:
    """Prepare weights, conversations and tokens for all later stages."""
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    prepare_weights(target)
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
            log.info("%s: %s", what, _counts(counts))
    if summary.dropped_share > _MUCH:
        log.warning(
            "%.0f %% of the records of this data set are dropped: %s; %s says which",
            *(100 * summary.dropped_share, _counts(summary.dropped), summary.ledger_path),
        )
    elif summary.dropped:
        log.info("dropped: %s", _counts(summary.dropped))


def _counts(counts: Mapping[str, int]) -> str:
    """Return counts by name, the largest first, up to twelve names."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    shown = [f"{name} {counts[name]:,}" for name in names[:_MAX_NAMES]]
    others = len(names) - len(shown)
    return ", ".join([*shown, f"and {others:,} more"] if others else shown)


@task(task_run_name="weights of {target.name}", cache_policy=NO_CACHE, persist_result=False)
def prepare_weights(target: TargetConfig) -> Path:
    """Find the target's weights, or fetch or convert them once, before all other work.

    Raises:
        ConfigError: they are missing and cannot be fetched; names the download and its folder.

    """
    key = artifact_key("weights", target.name)
    with stage_progress("target weights", key=key, total=1, unit="model") as progress:
        folder = weights.locate(target)
        progress.advance()
    return folder


@task(task_run_name="tokenize {dataset.name}", cache_policy=NO_CACHE, persist_result=False)
def tokenize(target: TargetConfig, dataset: DatasetConfig, space: Workspace) -> TokensSummary:
    """Apply the target's chat template to both splits, unless already done."""
    started = time.monotonic()
    log = get_run_logger()
    manifest = load_manifest(space.dataset_path)
    tokenizer = conversation_tokenizer(target)
    log.info(tokenizer.ends_text())
    content = content_name(dataset, manifest.fingerprint, tokenizer)
    # Held out first: a sample that both splits have, once truncated, must not be trained on.
    counts: dict[Split, int] = {"held_out": manifest.num_held_out, "train": manifest.num_train}
    files: dict[Split, TokenFile] = {}
    space.tokens_path.mkdir(parents=True, exist_ok=True)
    key = artifact_key("tokens-progress", space.target, space.dataset)
    total = sum(counts.values())
    with stage_progress("tokens", key=key, total=total, unit="conversations") as progress:
        for split, num_conversations in counts.items():
            path = space.token_file(split, content)
            if not path.exists():
                ledger_path = path.with_suffix(".dropped.parquet")
                with LedgerWriter(ledger_path) as ledger:
                    samples = tokenize_in_processes(
                        tokenizer,
                        load_conversations(space.dataset_path, split),
                        num_processes=_num_processes(dataset, num_conversations),
                        max_length=dataset.max_length,
                        min_supervised_tokens=dataset.min_supervised_tokens,
                        on_rejected=ledger.drop,
                        on_changed=ledger.enter_change,
                    )
                    held_out = files["held_out"].sample_ids if split == "train" else ()
                    write_token_file(path, _counted(samples, progress), without=held_out)
                log.info("tokens of %s: dropped %s", split, dict(ledger.dropped) or "none")
            files[split] = TokenFile(path)
        progress.move_to(total)
    train = files["train"]
    log.info("%d samples to train on, %d held out", len(train), len(files["held_out"]))
    _publish_report(train, tokenizer, target, dataset)
    return tokens_summary(files["train"], files["held_out"], tokenizer, content, started)


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


def _publish_report(
    train: TokenFile, tokenizer: ConversationTokenizer, target: TargetConfig, dataset: DatasetConfig
) -> None:
    """Write the page of the tokens and show its figures in the UI, unless already done."""
    page = page_path(train)
    with best_effort("the token report"):
        if not page.exists() and len(train):
            title = f"Tokens: {dataset.name} for {target.name}"
            report = write_token_report(
                train, tokenizer, max_length=dataset.max_length, title=title
            )
            key = artifact_key("tokens", target.name, dataset.name)
            publish_markdown(title, report.markdown, key=key)
            publish_plot(f"Lengths: {title}", report.lengths, key=f"{key}-lengths")
        get_run_logger().info("token report, with supervised tokens marked: %s", page)


def _num_processes(dataset: DatasetConfig, num_conversations: int) -> int:
    """Return the number of tokenising processes: each takes seconds to start."""
    worthwhile = -(-num_conversations // _CONVERSATIONS_PER_PROCESS)
    return dataset.tokenize_processes or max(1, min(os.cpu_count() or 1, worthwhile))


def _counted(
    samples: Iterable[TokenizedSample], progress: StageProgress
) -> Iterator[TokenizedSample]:
    for sample in samples:
        progress.advance()
        yield sample
