"""The stages before the target model: conversations, then tokens, each done once per content."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.data.manifest import load_manifest
from eagle_core.data.writer import Split
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.samples import TokenizedSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.parallel import tokenize_in_processes
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from flows.bridge.target_tokenizer import conversation_tokenizer
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.best_effort import best_effort
from flows.orchestration.progress import StageProgress, stage_progress
from flows.reports.token_report import publish_token_report
from flows.summaries import DatasetSummary, TokensSummary
from flows.workspace import Workspace

TOKENS_VERSION = 2
"""Raised whenever the same conversations could give other tokens or masks."""
_CONVERSATIONS_PER_PROCESS = 4000


def prepare(
    target: TargetConfig, dataset: DatasetConfig, home: str
) -> tuple[Workspace, TokensSummary]:
    """Bring weights, conversations and tokens to where every later stage expects them."""
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    prepare_weights(target)
    prepare_dataset(dataset, space)
    return space, tokenize(target, dataset, space)


@task(task_run_name="dataset {config.name}", cache_policy=NO_CACHE, persist_result=False)
def prepare_dataset(config: DatasetConfig, space: Workspace) -> DatasetSummary:
    """Read, normalise, deduplicate and split the conversations, unless that is done already."""
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
    """Find the target's weights, or fetch or convert them once, before anything else is done.

    Raises:
        ConfigError: they are not here and cannot be had; says what to download and where to put it.

    """
    key = artifact_key("weights", target.name)
    with stage_progress("target weights", key=key, total=1, unit="model") as progress:
        folder = weights.locate(target)
        progress.advance()
    return folder


@task(task_run_name="tokenize {dataset.name}", cache_policy=NO_CACHE, persist_result=False)
def tokenize(target: TargetConfig, dataset: DatasetConfig, space: Workspace) -> TokensSummary:
    """Apply the target's chat template to both splits, unless that is done already."""
    started = time.monotonic()
    log = get_run_logger()
    manifest = load_manifest(space.dataset_path)
    tokenizer = conversation_tokenizer(target)
    content = _content_name(dataset, manifest.fingerprint, tokenizer)
    # Held out first: of a sample that both splits have, cut to one length, training must not know.
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
                    write_token_file(path, _counted(samples, progress), without=held_out)
                log.info("tokens of %s: dropped %s", split, dict(ledger.dropped) or "none")
            files[split] = TokenFile(path)
        progress.move_to(total)
    train = files["train"]
    log.info("%d samples to train on, %d held out", len(train), len(files["held_out"]))
    with best_effort("the page of the tokens"):
        page = publish_token_report(
            train,
            tokenizer,
            max_length=dataset.max_length,
            title=f"Tokens: {dataset.name} for {target.name}",
            key=artifact_key("tokens", space.target, space.dataset),
        )
        log.info("what they look like, supervised tokens marked: %s", page)
    return _summary(files["train"], files["held_out"], tokenizer, content, started)


def known_tokens(target: TargetConfig, space: Workspace, content: str) -> TokensSummary | None:
    """Return the token files of this content if both are there; no data set is read."""
    started = time.monotonic()
    train, held_out = (space.token_file(split, content) for split in ("train", "held_out"))
    if not (train.exists() and held_out.exists()):
        return None
    tokenizer = conversation_tokenizer(target)
    return _summary(TokenFile(train), TokenFile(held_out), tokenizer, content, started)


def current_content(target: TargetConfig, dataset: DatasetConfig, space: Workspace) -> str | None:
    """Return the content of the token files of the data set as it was built last; None if never."""
    try:
        manifest = load_manifest(space.dataset_path)
    except (ConfigError, CorruptError):
        return None
    return _content_name(dataset, manifest.fingerprint, conversation_tokenizer(target))


def tokens_of_run(
    target: TargetConfig, dataset: DatasetConfig, space: Workspace, run: str, content: str
) -> TokensSummary:
    """Return the token files that a run began with, made again if need be.

    Raises:
        ConfigError: they are gone, and what they are made from has changed since.

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


def _summary(
    train: TokenFile,
    held_out: TokenFile,
    tokenizer: ConversationTokenizer,
    content: str,
    started: float,
) -> TokensSummary:
    return TokensSummary(
        content=content,
        train_path=train.path,
        held_out_path=held_out.path,
        tokenizer_fingerprint=tokenizer.tokenizer_fingerprint,
        template_fingerprint=tokenizer.template_fingerprint,
        num_samples=len(train) + len(held_out),
        num_tokens=sum(int(file.lengths.sum()) for file in (train, held_out)),
        num_supervised_tokens=train.num_supervised + held_out.num_supervised,
        seconds=time.monotonic() - started,
    )


def _num_processes(dataset: DatasetConfig, num_conversations: int) -> int:
    """Return how many processes tokenise: another one costs seconds until it has started."""
    worthwhile = -(-num_conversations // _CONVERSATIONS_PER_PROCESS)
    return dataset.tokenize_processes or max(1, min(os.cpu_count() or 1, worthwhile))


def _counted(
    samples: Iterable[TokenizedSample], progress: StageProgress
) -> Iterator[TokenizedSample]:
    for sample in samples:
        progress.advance()
        yield sample


def _content_name(
    dataset: DatasetConfig, dataset_fingerprint: str, tokenizer: ConversationTokenizer
) -> str:
    """Return a short digest of everything that decides the content of the token files."""
    decisive = [
        TOKENS_VERSION,
        dataset_fingerprint,
        dataset.max_length,
        dataset.min_supervised_tokens,
        tokenizer.tokenizer_fingerprint,
        tokenizer.template_fingerprint,
    ]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
