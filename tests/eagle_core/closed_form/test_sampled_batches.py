"""The sample of a closed-form start: what training reads first, each token once."""

import numpy as np
import pytest
import torch

from eagle_core.closed_form.sampled_batches import SampledBatches
from eagle_core.training.config import TrainingConfig
from eagle_core.training.distributed import ONE_PROCESS, Processes
from eagle_core.training.loader import LoaderState, steps
from eagle_core.training.pieces import WHOLE, Windows
from eagle_core.training.schedule import step_shape
from tests.eagle_core.closed_form.linear_source import LinearSource

CONFIG = TrainingConfig(shuffle_window=2, batch_tokens=100, seed=3)


def ids(batches: SampledBatches) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle_core.closed_form.sampled_batches._BATCH_TOKENS", 100)


def test_it_has_the_samples_that_training_reads_first() -> None:
    source = LinearSource()
    found = ids(SampledBatches(source, CONFIG, WHOLE, ONE_PROCESS, num_tokens=600))
    stream = steps(source, LoaderState(source_id="", seed=CONFIG.seed), step_shape(CONFIG, WHOLE))
    read: list[str] = []
    while len(read) < len(found):
        read += [name for batch in next(stream).batches for name in batch.sample_ids]
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert found == read[: len(found)]


def test_it_has_about_as_many_tokens_as_were_asked_for() -> None:
    source = LinearSource()
    batches = SampledBatches(source, CONFIG, WHOLE, ONE_PROCESS, num_tokens=600)
    assert 600 <= batches.num_tokens < 640
    assert sum(batch.num_tokens for batch in batches) == batches.num_tokens
    whole = SampledBatches(source, CONFIG, WHOLE, ONE_PROCESS, num_tokens=10**9)
    assert whole.num_tokens == int(source.lengths.sum())
    assert len(ids(whole)) == len(set(ids(whole))) == source.num_samples


def test_processes_share_it() -> None:
    source = LinearSource()
    shares = [
        ids(
            SampledBatches(
                source, CONFIG, WHOLE, Processes(rank=rank, world_size=3), num_tokens=900
            )
        )
        for rank in range(3)
    ]
    together = ids(SampledBatches(source, CONFIG, WHOLE, ONE_PROCESS, num_tokens=900))
    assert sorted(np.concatenate(shares).tolist()) == sorted(together)


def test_what_is_kept_is_read_once() -> None:
    source = LinearSource()
    batches = SampledBatches(source, CONFIG, WHOLE, ONE_PROCESS, num_tokens=600)
    first = ids(batches)
    assert source.num_fetched == len(first)
    assert ids(batches) == first
    assert source.num_fetched == len(first)


def test_beyond_the_memory_it_is_read_again_or_left_out() -> None:
    source = LinearSource()
    batches = SampledBatches(source, CONFIG, WHOLE, ONE_PROCESS, num_tokens=600)
    whole = ids(batches)
    batches = SampledBatches(source, CONFIG, WHOLE, ONE_PROCESS, num_tokens=600)
    batches.kept_bytes = 1  # one batch
    assert [ids(batches), ids(batches)] == [whole, whole]
    once = SampledBatches(source, CONFIG, WHOLE, ONE_PROCESS, num_tokens=600, refetch=False)
    once.kept_bytes = 1
    before = source.num_fetched
    part = ids(once)
    assert part == whole[: len(part)]
    assert len(part) < len(whole)
    assert ids(once) == part
    assert source.num_fetched == before + len(part)


def test_the_first_batches() -> None:
    batches = SampledBatches(LinearSource(), CONFIG, WHOLE, ONE_PROCESS, num_tokens=600)
    assert 200 <= sum(batch.num_tokens for batch in batches.first(200)) < 300
    assert sum(batch.num_tokens for batch in batches.first(10**6)) == batches.num_tokens


def test_long_samples_are_divided_as_in_training() -> None:
    source = LinearSource(longest=400)
    windows = Windows(tokens=100, before=20, after=4)
    batches = SampledBatches(source, CONFIG, windows, ONE_PROCESS, num_tokens=3000)
    tokens = [batch.input_ids[batch.is_own()] for batch in batches]
    assert max(batch.num_tokens for batch in batches) <= 100
    assert len(dict.fromkeys(ids(batches))) == source.num_fetched < len(ids(batches))
    whole = SampledBatches(LinearSource(longest=400), CONFIG, WHOLE, ONE_PROCESS, num_tokens=3000)
    assert torch.equal(torch.cat(tokens), torch.cat([batch.input_ids for batch in whole]))
    assert batches.num_tokens == whole.num_tokens
    once = SampledBatches(
        LinearSource(longest=400), CONFIG, windows, ONE_PROCESS, num_tokens=3000, refetch=False
    )
    assert len(list(once)) == len(tokens)
    assert once.num_tokens == whole.num_tokens
