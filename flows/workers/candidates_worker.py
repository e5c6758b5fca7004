"""The child process that compares aux layers and vocabularies: captures more layers, and solves.

Sends a `CandidatesLine` for each captured sample and each solved triple, and one with the result.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from eagle_core.closed_form.candidates import (
    Comparison,
    Triple,
    compare_candidates,
    require_positions,
)
from eagle_core.closed_form.state_rows import StateRows, counted_positions
from eagle_core.draft.vocabulary import DraftVocabulary, count_supervised_tokens
from eagle_core.errors import CorruptError
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target import weights
from eagle_core.target.capture import CapturingTarget, capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.placement import load_target
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.draft_setup import special_tokens
from flows.workers.channel import send, serve

VOCABULARY_SIZES = (4000, 8000, 16000, 32000)
"""Compared with the configured size and the target's, as far as the target has as many tokens."""


class CandidatesJob(BaseModel):
    """Which layers to capture, and of which samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    layers: tuple[int, ...]
    configured: Triple
    others: tuple[Triple, ...]
    """Triples that are measured in any case."""
    draft_vocab_size: int
    train_file: Path
    train_rows: tuple[int, ...]
    held_out_file: Path
    """The same file if no split is held out."""
    held_out_rows: tuple[int, ...]


class CandidatesLine(BaseModel):
    """What a child sends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    captured_tokens: int = 0
    """Since the line before; those of an unusable sample, too."""
    solved_triples: int = 0
    """Since the line before."""
    comparison: Comparison | None = None


def compare(job: CandidatesJob) -> Comparison:
    """Run the target, and compare candidates on its states."""
    files = TokenFile(job.train_file), TokenFile(job.held_out_file)
    train, held_out = (
        [file.fetch(row) for row in rows]
        for file, rows in zip(files, (job.train_rows, job.held_out_rows), strict=True)
    )
    for samples, what in ((train, "training"), (held_out, "held-out")):
        require_positions(sum(len(counted_positions(s.loss_mask)) for s in samples), what)
    target = load_target(job.target)
    device, vocab_size = target.device, target.model_config.vocab_size
    train_states = _captured(target, train, job.layers)
    held_out_states = _captured(target, held_out, job.layers)
    del target  # makes room for the sums
    embedding, head = load_ends(weights.locate(job.target), dtype=torch.float32)
    counts, held_out_counts = _counts(job, *files, vocab_size)
    vocabularies = _vocabularies(job, counts, vocab_size)
    configured = next(v for v in vocabularies if len(v) == min(job.draft_vocab_size, vocab_size))
    found = compare_candidates(
        train_states,
        held_out_states,
        layers=job.layers,
        configured=job.configured,
        others=job.others,
        embedding=embedding,
        head=head,
        vocabulary=configured,
        vocabularies=vocabularies,
        held_out_counts=held_out_counts,
        device=device,
        on_solved=lambda: send(CandidatesLine(solved_triples=1)),
    )
    return replace(found, is_held_out=job.held_out_file != job.train_file)


def _captured(
    target: CapturingTarget, samples: Sequence[TokenizedSample], layers: Sequence[int]
) -> StateRows:
    def states() -> Iterator[HiddenStateSample]:
        for state in capture_states(target, samples, layers=layers, on_unusable=_skip):
            send(CandidatesLine(captured_tokens=len(state)))
            yield state

    rows = StateRows.of(states())
    if rows is None:
        raise CorruptError(
            f"target {target.config.name}: none of {len(samples)} tried samples has finite states; "
            "check the weights and try dtype float32"
        )
    return rows


def _skip(sample: TokenizedSample, reason: str) -> None:  # noqa: ARG001
    """Count a sample that a store would exclude, too."""
    send(CandidatesLine(captured_tokens=len(sample)))


def _counts(
    job: CandidatesJob, train: TokenFile, held_out: TokenFile, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return [V] the supervised tokens of the two splits, without what is kept apart here."""
    if job.train_file != job.held_out_file:
        return (
            count_supervised_tokens(train, vocab_size),
            count_supervised_tokens(held_out, vocab_size),
        )
    apart = count_supervised_tokens(map(held_out.fetch, job.held_out_rows), vocab_size)
    return count_supervised_tokens(train, vocab_size) - apart, apart


def _vocabularies(job: CandidatesJob, counts: np.ndarray, vocab_size: int) -> list[DraftVocabulary]:
    always = special_tokens(job.target, vocab_size)
    sizes = {size for size in VOCABULARY_SIZES if len(always) <= size < vocab_size}
    sizes |= {min(job.draft_vocab_size, vocab_size), vocab_size}
    return [DraftVocabulary.build(counts, size=size, always=always) for size in sorted(sizes)]


if __name__ == "__main__":
    sys.exit(serve(CandidatesJob, lambda job: send(CandidatesLine(comparison=compare(job)))))
