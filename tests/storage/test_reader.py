"""The reader travels between processes and threads, and holds no more than it may."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from storage.errors import ShardCorruptError
from storage.objects.cache_contents import BOOKS
from storage.objects.object_cache import ObjectCache
from storage.store import Store
from tests.storage.synthetic import data_key


def test_pickled_reader_reads_the_same(filled: Store) -> None:
    reader = filled.reader(filled.snapshot())
    expected = reader.fetch(3)
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert copy.snapshot_id == reader.snapshot_id
    np.testing.assert_array_equal(copy.fetch(3).aux_hidden_states, expected.aux_hidden_states)


def test_threads_see_their_own_samples(filled: Store) -> None:
    reader = filled.reader(filled.snapshot(), cache_bytes=1)
    indices = [index for _ in range(3) for index in range(len(reader))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: len(reader.fetch(index)), indices))
    assert found == [reader.lengths[index] for index in indices]


def test_object_cache_holds_its_limit_and_no_bad_bytes(filled: Store, tmp_path: Path) -> None:
    record = next(iter(filled.commits().values()))
    largest = max(digest.num_bytes for digest in record.objects.values())
    cache = ObjectCache(folder=tmp_path / "cache", limit_bytes=largest * 4)
    for _ in range(2):
        reader = filled.reader(filled.snapshot(), cache_bytes=1, object_cache=cache)
        for index in range(len(reader)):
            reader.fetch(index)
            kept = [path for path in cache.folder.iterdir() if path.name != BOOKS]
            assert 0 < sum(path.stat().st_size for path in kept) <= cache.limit_bytes
        for path in kept:
            path.write_bytes(b"bad")  # the second round notices and fetches again


def test_refuses_an_index_outside(filled: Store) -> None:
    reader = filled.reader(filled.snapshot())
    with pytest.raises(IndexError, match="sample 12 is outside the snapshot of 12"):
        reader.fetch(12)
    with pytest.raises(IndexError, match="sample -1"):
        reader.fetch(-1)


def test_prefetch_reads_beside_and_hides_no_damage(filled: Store) -> None:
    snapshot = filled.snapshot()
    reader = filled.reader(snapshot)
    shard_id = snapshot.shard_ids[0]
    record = filled.commit(shard_id)
    key = max(record.objects, key=lambda key: record.objects[key].num_bytes)
    path = Path(filled.root.root) / "shards" / shard_id / key
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    everything = range(len(reader))
    reader.prefetch(everything)
    reader.fetch(len(reader) - 1)  # other shards are served
    with pytest.raises(ShardCorruptError, match="eyas repair"):
        reader.fetch(0)
    path.write_bytes(whole)
    assert reader.fetch(0).sample_id == snapshot.sample_id(0)


def test_an_old_error_of_a_prefetch_is_not_raised(filled: Store) -> None:
    """The sample may have been another rank's, and be fetched hours later."""
    snapshot = filled.snapshot()
    reader = filled.reader(snapshot)
    key = data_key(filled, snapshot.shard_ids[0])
    whole = filled.root.read(key)
    filled.root.write(key, whole[:-1])
    reader.prefetch([0])
    (reading,) = reader._shards.values()
    assert isinstance(reading.exception(), ShardCorruptError)
    filled.root.write(key, whole)
    assert reader.fetch(0).sample_id == snapshot.sample_id(0)


def test_only_what_is_fetched_here_is_read_ahead_where_processes_share_nothing(
    filled: Store,
) -> None:
    snapshot = filled.snapshot()
    reader = filled.reader(snapshot)
    reader.prefetch([0], others=range(1, len(reader)))
    assert list(reader._shards) == [snapshot.shard_ids[0]]


def test_samples_are_read_only(filled: Store) -> None:
    """They are views of a shard that serves other samples too."""
    sample = filled.reader(filled.snapshot()).fetch(0)
    with pytest.raises(ValueError, match="read-only"):
        sample.aux_hidden_states[0] = 0


def test_memory_stays_within_the_limit(filled: Store) -> None:
    raw_bytes = [record.raw_bytes for record in filled.commits().values()]
    reader = filled.reader(filled.snapshot(), cache_bytes=2 * max(raw_bytes))
    for index in range(len(reader)):
        reader.fetch(index)
        held = [reading.result().num_bytes for reading in reader._shards.values()]
        assert 0 < sum(held) <= 2 * max(raw_bytes) + max(held)
    assert len(held) < len(raw_bytes)
