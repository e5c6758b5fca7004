"""What the child is given is what it compares: no row twice, and every token counted."""

from collections.abc import Sequence
from math import comb
from pathlib import Path

import numpy as np
import pytest

from eagle_core.draft.vocabulary import DraftVocabulary, count_supervised_tokens
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from flows.bridge.draft_setup import special_tokens
from flows.tasks.candidates import plan_comparison
from flows.workers import candidates_worker
from flows.workers.candidates_worker import CandidatesLine, compare

VOCAB_SIZE = 300
"""Ids in the samples; the target has more."""


def write_samples(path: Path, count: int, *, seed: int) -> TokenFile:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        length = int(rng.integers(20, 60))
        ids = (VOCAB_SIZE * rng.random(length) ** 2).astype(np.int32)  # low ids are frequent
        mask = rng.random(length) < 0.7
        samples.append(
            TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)
        )
    return write_token_file(path, samples)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[CandidatesLine]:
    """What the child would send."""
    sent: list[CandidatesLine] = []
    monkeypatch.setattr(candidates_worker, "send", sent.append)
    return sent


@pytest.mark.parametrize("num_held_out", [0, 20])
def test_vocabularies_are_built_from_what_is_not_measured_on(
    tmp_path: Path, target: TargetConfig, lines: list[CandidatesLine], num_held_out: int
) -> None:
    train = write_samples(tmp_path / "train.arrow", 60, seed=0)
    held_out = write_samples(tmp_path / "held_out.arrow", num_held_out, seed=1)
    job = plan_comparison(target, 100, train, held_out)
    found = compare(job)
    measured = held_out if num_held_out else train
    apart = [measured.fetch(row) for row in job.held_out_rows]
    solved = [train.fetch(row) for row in job.train_rows]
    assert not {s.sample_id for s in apart} & {s.sample_id for s in solved}
    assert len(apart) + len(solved) == 60 + num_held_out
    assert found.num_conversations == len(apart) == (num_held_out or 12)
    assert found.num_held_out == _num_positions(apart)
    assert found.num_positions == _num_positions(solved)
    vocab_size = found.vocabularies[-1].size
    vocabulary = DraftVocabulary.build(
        count_supervised_tokens(solved, vocab_size),
        size=100,
        always=special_tokens(target, vocab_size),
    )
    expected = vocabulary.coverage(count_supervised_tokens(apart, vocab_size))
    assert [one.size for one in found.vocabularies] == [100, vocab_size]
    assert found.vocabularies[0].coverage == expected < found.vocabularies[1].coverage == 1
    assert sum(line.captured_tokens for line in lines) == sum(map(len, apart + solved))
    assert sum(line.solved_triples for line in lines) == comb(8, 3) == found.num_triples


def _num_positions(samples: Sequence[TokenizedSample]) -> int:
    return sum(int(sample.loss_mask[2:].sum()) for sample in samples)
