"""The stages before the target model: conversations, then tokens, each run once per content."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.data.manifest import load_manifest
from eagle_core.data.writer import Split
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.embedded_tokens import require_embedded
from eagle_core.target.model_config import read_model_config
from eagle_core.target.preflight import check_target, check_weights
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.parallel import tokenize_in_processes
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from flows.bridge.draft_setup import require_draft_sizes
from flows.bridge.target_tokenizer import conversation_tokenizer
from flows.bridge.token_files import content_name, known_tokens, tokens_summary
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_markdown, publish_plot
from flows.orchestration.best_effort import best_effort
from flows.orchestration.progress import StageProgress, stage_progress
from flows.reports.token_report import page_path, write_token_report
from flows.summaries import DatasetSummary, TokensSummary
from flows.workspace import Workspace

_CONVERSATIONS_PER_PROCESS = 4000


def prepare(
    target: TargetConfig,
    dataset: DatasetConfig,
    home: str,
    *,
    capture: Literal["here", "on workers"] | None = None,
) -> tuple[Workspace, TokensSummary]:
    """Prepare weights, conversations and tokens for all later stages.

    With `capture`, the place where the target will run on the tokens, it is checked first.
    """
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    prepare_weights(target)
    if capture is not None:
        here = capture == "here"
        check_runnable(target, max_length=dataset.max_length, runs_here=here)
    prepare_dataset(dataset, space)
    return space, tokenize(target, dataset, space)


@task(task_run_name="dataset {config.name}", cache_policy=NO_CACHE, persist_result=False)
def prepare_dataset(config: DatasetConfig, space: Workspace) -> DatasetSummary:
    """Read, normalise, deduplicate and split the conversations, unless already done."""
    started = time.monotonic()
    key = artifact_key("dataset-progress", space.dataset)
    with stage_progress("data set", key=key, total=100, unit="%") as progress:
        manifest = build_dataset(
            config,
            out_dir=space.dataset_path,
            progress=lambda share, what: progress.move_to(int(100 * share), note=what),
        )
    return DatasetSummary(
        path=space.dataset_path,
        fingerprint=manifest.fingerprint,
        num_records=manifest.num_records,
        num_train=manifest.num_train,
        num_held_out=manifest.num_held_out,
        num_dropped=sum(manifest.dropped.values()),
        seconds=time.monotonic() - started,
    )


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
) -> None:
    """Refuse within seconds what would fail after hours: see `check_target` for the arguments.

    Raises:
        ConfigError: this target cannot be run, or no draft can be made for it; names the cause.
        CorruptError: its weights are incomplete; names the tensors.

    """
    check_target(target, max_length=max_length, runs_here=runs_here, rolls_back=rolls_back)
    require_draft_sizes(target)


@task(task_run_name="tokenize {dataset.name}", cache_policy=NO_CACHE, persist_result=False)
def tokenize(target: TargetConfig, dataset: DatasetConfig, space: Workspace) -> TokensSummary:
    """Apply the target's chat template to both splits, unless already done."""
    started = time.monotonic()
    log = get_run_logger()
    manifest = load_manifest(space.dataset_path)
    tokenizer = conversation_tokenizer(target)
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
                    )
                    held_out = files["held_out"].sample_ids if split == "train" else ()
                    embedded = _embedded(samples, target, tokenizer)
                    write_token_file(path, _counted(embedded, progress), without=held_out)
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


def _embedded(
    samples: Iterable[TokenizedSample], target: TargetConfig, tokenizer: ConversationTokenizer
) -> Iterator[TokenizedSample]:
    """Yield the samples; ConfigError if one has a token that the target has no embedding for."""
    num_rows = read_model_config(target, weights.locate(target)).vocab_size
    for sample in samples:
        where = sample.location or f"sample {sample.sample_id}"
        require_embedded(sample.input_ids, num_rows, target, where=where, name_of=tokenizer.token)
        yield sample


def _counted(
    samples: Iterable[TokenizedSample], progress: StageProgress
) -> Iterator[TokenizedSample]:
    for sample in samples:
        progress.advance()
        yield sample
