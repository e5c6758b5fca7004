"""The stage between conversations and hidden states: token ids and loss masks."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.data.build import load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.data.manifest import DatasetManifest, load_manifest
from eagle_core.data.writer import Split
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.embedded_tokens import require_embedded
from eagle_core.target.model_config import read_model_config
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.parallel import tokenize_in_processes
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from flows.bridge.token_files import content_name, tokens_summary
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_markdown, publish_plot
from flows.orchestration.best_effort import best_effort
from flows.orchestration.progress import StageProgress, stage_progress
from flows.reports.counts import MUCH, counts_text
from flows.reports.token_report import page_path, write_token_report
from flows.summaries import TokensSummary
from flows.workspace import Workspace

_CONVERSATIONS_PER_PROCESS = 4000
_LEDGER_SUFFIX = ".dropped.parquet"
_LOOKED_AT = 1000
"""Conversations that are tokenised again to say how long their prompts are."""
_NO_LIMIT = 1 << 60


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
            sources = _given(manifest, split)
            made = _made(path, sources)
            if made is None:
                ledger_path = path.with_suffix(_LEDGER_SUFFIX)
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
                    embedded = _embedded(samples, target, tokenizer)
                    made = write_token_file(
                        path,
                        _counted(embedded, progress),
                        without=held_out,
                        sources=sources,
                    )
                _report_tokens(split, num_conversations, ledger, ledger_path)
            files[split] = made
        progress.move_to(total)
    train = files["train"]
    log.info("%d samples to train on, %d held out", len(train), len(files["held_out"]))
    if not len(train):
        conversations = load_conversations(space.dataset_path, "train")
        raise ConfigError(_nothing_left(dataset, tokenizer, conversations, train.path))
    _publish_report(train, tokenizer, target, dataset)
    return tokens_summary(files["train"], files["held_out"], tokenizer, content, started)


def _given(manifest: DatasetManifest, split: Split) -> dict[str, int]:
    """Return how many conversations each of several sources gave to a split."""
    by_source = manifest.by_source.items()
    return {
        name: counts.num_train if split == "train" else counts.num_held_out
        for name, counts in by_source
    }


def _made(path: Path, sources: Mapping[str, int]) -> TokenFile | None:
    """Return the token file if it exists, and each sample is of the source that it records.

    The data set has them source by source, so that their numbers tell.
    """
    if not path.exists():
        return None
    found = TokenFile(path)
    return found if [*found.sources.items()] == [*sources.items()] else None


def _report_tokens(split: Split, total: int, ledger: LedgerWriter, path: Path) -> None:
    """Log what tokenising dropped and changed; warn if much was dropped."""
    log = get_run_logger()
    num_dropped = ledger.dropped.total()
    if ledger.changed:
        log.info("tokens of %s: changed: %s; ledger: %s", split, counts_text(ledger.changed), path)
    if num_dropped > MUCH * total:
        log.warning(
            "tokens of %s: %s dropped of %s conversations: %s; %s says which",
            *(split, f"{num_dropped:,}", f"{total:,}", counts_text(ledger.dropped), path),
        )
    else:
        dropped = f"{counts_text(ledger.dropped)}; ledger: {path}" if num_dropped else "none"
        log.info("tokens of %s: dropped: %s", split, dropped)


def _nothing_left(
    dataset: DatasetConfig,
    tokenizer: ConversationTokenizer,
    conversations: Iterable[Conversation],
    train_path: Path,
) -> str:
    """Return the message for a data set of which tokenising leaves nothing to train on."""
    ledger = train_path.with_suffix(_LEDGER_SUFFIX)
    left = f"data set {dataset.name}: no sample to train on is left after tokenising"
    message = f"{left}; {ledger} says why"
    some = islice(conversations, _LOOKED_AT)
    starts = [
        int(sample.loss_mask.argmax())
        for sample in tokenizer.tokenize_all(some, max_length=_NO_LIMIT)
    ]
    if starts and min(starts) >= dataset.max_length:
        return (
            f"{message}: dataset.max_length {dataset.max_length} is shorter than every prompt "
            f"(the shortest answer starts at token {min(starts)}); raise it"
        )
    return f"{message}; correct the data, `target.template` or `dataset.min_supervised_tokens`"


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
    num_rows = read_model_config(target, weights.locate_description(target)).vocab_size
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
