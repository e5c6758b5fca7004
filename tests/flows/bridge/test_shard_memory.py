"""Decoded shards are bounded by the machine's memory, and the user is told what that costs."""

import pytest

from eagle_core.training.config import TrainingConfig
from flows.bridge.shard_memory import decoded_bytes
from storage.records.snapshot import Snapshot
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples

SHARD_BYTES = 1000
TRAINING = TrainingConfig(shuffle_window=2, batch_tokens=100, num_processes=2)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Return one of many shards."""
    store = Store.create(str(tmp_path_factory.mktemp("store")), make_identity())
    samples = make_samples(60, tokens=(20, 60))
    fill(store, samples, shard_tokens=100)
    store.publish([sample.sample_id for sample in samples])
    return store.snapshot()


def found(snapshot: Snapshot, training: TrainingConfig = TRAINING, *, is_shared: bool) -> int:
    return decoded_bytes(training, snapshot, shard_bytes=SHARD_BYTES, is_shared=is_shared)


def give(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr("flows.bridge.shard_memory.memory_bytes", lambda: num_bytes)


def test_with_enough_memory_all_shards_in_use_are_held(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give(monkeypatch, 10**9)
    assert found(snapshot, is_shared=False) == 2 * SHARD_BYTES
    everything = len(snapshot.shard_ids) * SHARD_BYTES
    assert 4 * SHARD_BYTES <= found(snapshot, is_shared=True) < everything
    long_steps = TRAINING.model_copy(update={"batches_per_step": 1000})
    assert found(snapshot, long_steps, is_shared=True) == everything
    assert caplog.text == ""


def test_no_more_than_a_third_of_the_memory_is_held(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give(monkeypatch, 9 * SHARD_BYTES)
    assert found(snapshot, is_shared=True) == 3 * SHARD_BYTES
    assert "decoded more than once" in caplog.text


def test_a_window_is_always_held(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it, shards would be decoded again for each batch."""
    give(monkeypatch, 3 * SHARD_BYTES)
    assert found(snapshot, is_shared=True) == 2 * SHARD_BYTES
    assert "decoded more than once" in caplog.text
    caplog.clear()
    assert found(snapshot, is_shared=False) == 2 * SHARD_BYTES
    assert caplog.text == ""
