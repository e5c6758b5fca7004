"""Compare other aux layers and vocabularies on a few conversations, before states are stored."""

import math
from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.closed_form.candidates import Comparison, Triple, candidate_layers
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import (
    are_aux_layers,
    aux_layers,
    default_aux_layers,
    read_model_config,
)
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.sampled_rows import rows_of_tokens
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.progress import stage_progress
from flows.summaries import TokensSummary
from flows.workers.candidates_worker import CandidatesJob, CandidatesLine
from flows.workers.child_process import run_child

TRAIN_TOKENS, HELD_OUT_TOKENS = 32_000, 8_000
_EVERY_APART = 5
"""If no split is held out, one of so many conversations is kept apart."""


@task(task_run_name="candidates for {target.name}", cache_policy=NO_CACHE, persist_result=False)
def compare_on_sample(
    target: TargetConfig, draft_vocab_size: int, tokens: TokensSummary
) -> Comparison:
    """Run the target on a sample of both splits, in a child process, and compare candidates.

    Raises:
        ConfigError: the sample has too few supervised positions.

    """
    job = plan_comparison(
        target, draft_vocab_size, TokenFile(tokens.train_path), TokenFile(tokens.held_out_path)
    )
    num_tokens = _num_tokens(job.train_file, job.train_rows)
    num_tokens += _num_tokens(job.held_out_file, job.held_out_rows)
    log = get_run_logger()
    log.info(
        "candidates: the target runs on %s tokens, and %d of its layers are captured",
        f"{num_tokens:,}",
        len(job.layers),
    )
    what = "the process that compares aux layers"
    lines = map(
        CandidatesLine.model_validate_json,
        run_child("flows.workers.candidates_worker", job, what=what),
    )
    key = artifact_key("candidates-states", target.name)
    with stage_progress("states", key=key, total=num_tokens, unit="tokens") as progress:
        for line in lines:
            progress.advance(line.captured_tokens)
            if progress.done >= num_tokens:
                break
    key, total = artifact_key("candidates-triples", target.name), math.comb(len(job.layers), 3)
    comparison: Comparison | None = None
    with stage_progress("aux layers", key=key, total=total, unit="triples") as progress:
        for line in lines:
            progress.advance(line.solved_triples)
            comparison = line.comparison
    assert comparison is not None  # noqa: S101 (the last line of a child that did not fail)
    return comparison


def plan_comparison(
    target: TargetConfig, draft_vocab_size: int, train: TokenFile, held_out: TokenFile
) -> CandidatesJob:
    """Return which rows the target runs on, and which of its layers are captured."""
    num_layers = read_model_config(target, weights.locate(target)).num_hidden_layers
    configured = aux_layers(target, num_layers)
    eagle3 = eagle3_layers(num_layers)
    train_rows = rows_of_tokens(train, TRAIN_TOKENS)
    if len(held_out):
        held_out_rows = rows_of_tokens(held_out, HELD_OUT_TOKENS)
    else:
        held_out = train
        rows = rows_of_tokens(train, TRAIN_TOKENS + HELD_OUT_TOKENS)
        train_rows, held_out_rows = _apart(rows)
    return CandidatesJob(
        target=target,
        layers=candidate_layers(num_layers, (*configured, *(eagle3 or ()))),
        configured=configured,
        others=() if eagle3 is None else (eagle3,),
        draft_vocab_size=draft_vocab_size,
        train_file=train.path,
        train_rows=train_rows,
        held_out_file=held_out.path,
        held_out_rows=held_out_rows,
    )


def eagle3_layers(num_layers: int) -> Triple | None:
    """Return the layers of EAGLE-3; None if a model has too few layers for them."""
    layers = default_aux_layers(num_layers)
    return layers if are_aux_layers(layers, num_layers) else None


def _apart(rows: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the rows to solve on, and every fifth to measure on."""
    kept = tuple(row for number, row in enumerate(rows) if (number + 1) % _EVERY_APART)
    return kept, tuple(rows[_EVERY_APART - 1 :: _EVERY_APART])


def _num_tokens(path: Path, rows: Sequence[int]) -> int:
    return int(TokenFile(path).lengths[list(rows)].sum())
