"""Token files of a data set, named by a digest of everything that determines their content."""

import hashlib
import json
import time

from eagle_core.data.config import DatasetConfig
from eagle_core.data.manifest import load_manifest
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.token_file import TokenFile
from flows.summaries import TokensSummary
from flows.workspace import Workspace

TOKENS_VERSION = 3
"""Increased whenever the same conversations could give other tokens or masks."""


def known_tokens(target: TargetConfig, space: Workspace, content: str) -> TokensSummary | None:
    """Return the token files of this content if both exist; no data set is read."""
    started = time.monotonic()
    train, held_out = (space.token_file(split, content) for split in ("train", "held_out"))
    if not (train.exists() and held_out.exists()):
        return None
    tokenizer = conversation_tokenizer(target)
    return tokens_summary(TokenFile(train), TokenFile(held_out), tokenizer, content, started)


def current_content(target: TargetConfig, dataset: DatasetConfig, space: Workspace) -> str | None:
    """Return the content digest for the data set as it was last built; None if it never was."""
    try:
        manifest = load_manifest(space.dataset_path)
    except (ConfigError, CorruptError):
        return None
    return content_name(dataset, manifest.fingerprint, conversation_tokenizer(target))


def tokens_summary(
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


def content_name(
    dataset: DatasetConfig, dataset_fingerprint: str, tokenizer: ConversationTokenizer
) -> str:
    """Return a short digest of everything that determines the content of the token files."""
    decisive = [
        TOKENS_VERSION,
        dataset_fingerprint,
        dataset.max_length,
        dataset.min_supervised_tokens,
        tokenizer.tokenizer_fingerprint,
        tokenizer.template_fingerprint,
        tokenizer.masks_fingerprint,
    ]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
