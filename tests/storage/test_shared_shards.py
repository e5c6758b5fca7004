"""Processes of one machine decode each shard once, and find what the others decoded."""

import errno
import gc
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import storage.reader
from storage.encoding.shard import DecodedShard, decode_shard
from storage.errors import ShardCorruptError
from storage.shared_shards import _SPARE_DESCRIPTORS, SharedShards
from storage.store import Store
from tests.storage.synthetic import data_key
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(
    SharedShards.where_possible(Path()) is None, reason="this system cannot share memory by number"
)

OTHER = """
import sys
from pathlib import Path
from storage.shared_shards import SharedShards
from storage.store import Store
store = Store.open(sys.argv[1])
reader = store.reader(store.snapshot(), shared=SharedShards(Path(sys.argv[2])))
for index in range(len(reader)):
    reader.fetch(index)
print("decoded", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the ids of the shards that this process decodes from now on."""
    found: list[str] = []

    def counted(shard_id: str, *args: object, **kwargs: object) -> DecodedShard:
        found.append(shard_id)
        return decode_shard(shard_id, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(storage.reader, "decode_shard", counted)
    return found


@pytest.fixture
def other(filled: Store, tmp_path: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """Another process that has decoded all shards, and keeps them until its input ends."""
    command = [sys.executable, "-c", OTHER, filled.root.root, str(tmp_path / "shared")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"decoded\n"
        yield child
        child.kill()


def require_equal(store: Store, shared: SharedShards) -> None:
    """Compare all samples with those of a reader that shares nothing."""
    plain, reader = (store.reader(store.snapshot(), shared=way) for way in (None, shared))
    for index in range(len(plain)):
        expected, found = plain.fetch(index), reader.fetch(index)
        for name in ("input_ids", "loss_mask", "target_argmax", "target_logsumexp"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_array_equal(found.aux_hidden_states, expected.aux_hidden_states)
        np.testing.assert_array_equal(found.last_hidden_state, expected.last_hidden_state)
        assert found.input_ids.dtype == expected.input_ids.dtype
        for array in (found.aux_hidden_states, found.input_ids):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


@pytest.mark.slow
def test_another_process_decodes_for_this_one(
    filled: Store, tmp_path: Path, other: "subprocess.Popen[bytes]", decoded: list[str]
) -> None:
    shared = SharedShards(tmp_path / "shared")
    reader = filled.reader(filled.snapshot(), shared=shared)
    samples = [reader.fetch(index) for index in range(len(reader))]
    assert decoded == []
    other.kill()
    other.wait()
    again = filled.reader(filled.snapshot(), shared=SharedShards(tmp_path / "shared"))
    for index, sample in enumerate(samples):  # they outlive the process that decoded them
        found = again.fetch(index)
        np.testing.assert_array_equal(found.aux_hidden_states, sample.aux_hidden_states)
    assert sorted(decoded) == sorted(filled.snapshot().shard_ids)


def test_shared_samples_are_the_stored_ones(filled: Store, tmp_path: Path) -> None:
    require_equal(filled, SharedShards(tmp_path))  # decoded here
    require_equal(filled, SharedShards(tmp_path))  # mapped


def num_open_files() -> int:
    gc.collect()  # of earlier tests
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_evicted_shards_are_withdrawn(filled: Store, tmp_path: Path, decoded: list[str]) -> None:
    open_files = num_open_files()
    first = filled.reader(filled.snapshot(), cache_bytes=1, shared=SharedShards(tmp_path))
    for index in range(len(first)):
        first.fetch(index)
    num_shards = len(filled.snapshot().shard_ids)
    assert len(list(tmp_path.glob("*.json"))) <= 2
    assert num_open_files() - open_files < num_shards
    assert len(decoded) == num_shards
    second = filled.reader(filled.snapshot(), cache_bytes=1, shared=SharedShards(tmp_path))
    second.fetch(0)
    assert len(decoded) == num_shards + 1


def test_a_number_that_is_another_file_by_now_is_no_shard(
    filled: Store, tmp_path: Path, decoded: list[str]
) -> None:
    shared = SharedShards(tmp_path)
    filled.reader(filled.snapshot(), shared=shared).fetch(0)
    (memory,) = shared._own.values()
    replaced = os.open(os.devnull, os.O_RDONLY)
    os.dup2(replaced, memory.descriptor)
    os.close(replaced)
    filled.reader(filled.snapshot(), shared=SharedShards(tmp_path)).fetch(0)
    assert len(decoded) == 2


def test_a_shard_that_another_decodes_is_awaited_only_when_it_is_needed(
    filled: Store, tmp_path: Path, decoded: list[str]
) -> None:
    snapshot = filled.snapshot()
    ours, theirs = SharedShards(tmp_path), SharedShards(tmp_path)
    may_end, has_begun = threading.Event(), threading.Event()
    reader = filled.reader(snapshot, shared=ours)
    first = snapshot.shard_ids[0]

    def slowly(_: object) -> DecodedShard:
        has_begun.set()
        may_end.wait()
        shard = filled.reader(snapshot, shared=None)._read(first, wait=True)
        assert shard is not None
        return shard

    other = threading.Thread(target=lambda: theirs.get(first, slowly, wait=True))
    other.start()
    has_begun.wait()
    reader.prefetch(range(len(reader)))
    reader.fetch(len(reader) - 1)
    wait_for(
        lambda: all(reading.done() for reading in reader._shards.values()),
        what="the reader to pass over the first shard",
        every_seconds=0.01,
    )
    assert first not in decoded
    may_end.set()
    assert reader.fetch(0).sample_id == snapshot.sample_id(0)
    other.join()
    assert sorted(decoded) == sorted(snapshot.shard_ids)


def test_without_descriptors_each_decodes_for_itself(
    filled: Store,
    tmp_path: Path,
    decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    snapshot = filled.snapshot()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    scarce = (num_open_files() + _SPARE_DESCRIPTORS + 4, most)
    monkeypatch.setattr(resource, "getrlimit", lambda _: scarce)
    for _ in range(2):
        require_equal(filled, SharedShards(tmp_path))
    assert 0 < len(list(tmp_path.glob("*.json"))) < len(snapshot.shard_ids)
    assert "ulimit -n" in caplog.text
    num_before = len(decoded)
    monkeypatch.setattr(os, "memfd_create", refuse)
    caplog.clear()
    require_equal(filled, SharedShards(tmp_path / "none"))
    assert len(decoded) == num_before + 2 * len(snapshot.shard_ids)
    assert caplog.text.count("Too many open files") == 1


def refuse(_: str) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_damage_is_an_error_for_each_and_mends(filled: Store, tmp_path: Path) -> None:
    snapshot = filled.snapshot()
    key = data_key(filled, snapshot.shard_ids[0])
    whole = filled.root.read(key)
    filled.root.write(key, whole[:-1])
    readers = [filled.reader(snapshot, shared=SharedShards(tmp_path)) for _ in range(2)]
    for reader in readers:
        reader.prefetch([0])
        with pytest.raises(ShardCorruptError, match="eyas repair"):
            reader.fetch(0)
    filled.root.write(key, whole)
    for reader in readers:
        assert reader.fetch(0).sample_id == snapshot.sample_id(0)
