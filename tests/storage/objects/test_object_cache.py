"""The object cache never exceeds its limit, evicts only its own, and never serves bad bytes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ConfigError, OutOfSpaceError, ShardCorruptError
from storage.objects.digests import ObjectDigest
from storage.objects.object_cache import ObjectCache
from storage.store import Store
from tests.storage.synthetic import data_key, fill, make_identity, make_samples

FILLER = """
import sys
from pathlib import Path
from storage.objects.object_cache import ObjectCache
from storage.records.commit_record import ObjectDigest
cache = ObjectCache(folder=Path(sys.argv[1]), limit_bytes=5 * 2**20)
for turn in range(50):
    data = bytes([int(sys.argv[2]), turn]) * 2**19
    cache.fetch(ObjectDigest.of(data), lambda: data)
"""


def used_bytes(folder: Path) -> int:
    total = 0
    for path in list(folder.iterdir()):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), max_size=40), limit=st.integers(0, 150))
def test_limit_holds_and_what_is_served_is_right(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    cache = ObjectCache(folder=tmp_path_factory.mktemp("cache"), limit_bytes=limit)
    fetched = 0
    for size in sizes:
        data = bytes([size]) * size

        def remote(data: bytes = data) -> bytes:
            nonlocal fetched
            fetched += 1
            return data

        assert cache.fetch(ObjectDigest.of(data), remote) == data
        assert used_bytes(cache.folder) <= limit
    if sum(set(sizes)) <= limit:
        assert fetched == len(set(sizes)), "nothing had to be evicted"


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = ObjectCache(folder=tmp_path, limit_bytes=20)
    one, two, three = (bytes([byte]) * 10 for byte in (1, 2, 3))

    def keep(data: bytes) -> None:
        cache.fetch(ObjectDigest.of(data), lambda: data)
        time.sleep(0.02)

    for data in (one, two, one, three):
        keep(data)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {one, three}


def test_only_what_can_be_fetched_again_is_evicted(tmp_path: Path) -> None:
    """Even where a user points the cache at a folder of their own, and after a kill in it."""
    (tmp_path / "thesis.tex").write_bytes(b"x" * 500)
    (tmp_path / "photos").mkdir()
    killed = tmp_path / f"{'0' * 32}.tmp"
    killed.write_bytes(b"x" * 90)
    cache = ObjectCache(folder=tmp_path, limit_bytes=100)
    for byte in range(4):
        data = bytes([byte]) * 60
        cache.fetch(ObjectDigest.of(data), lambda data=data: data)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"thesis.tex", "photos", ObjectDigest.of(bytes([3]) * 60).xxh3_128}
    assert not killed.exists()


@pytest.mark.slow
def test_processes_keep_the_limit_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLER, str(tmp_path)]
    children = [subprocess.Popen([*command, str(child)]) for child in range(3)]
    most = 0
    while any(child.poll() is None for child in children):
        most = max(most, used_bytes(tmp_path))
    assert [child.returncode for child in children] == [0, 0, 0]
    assert 4 * 2**20 <= most <= 5 * 2**20


def test_a_cached_copy_that_went_bad_is_fetched_again(root: str, tmp_path: Path) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(4)
    fill(store, samples, shard_tokens=10**6)
    snapshot = store.publish([sample.sample_id for sample in samples])
    cache = ObjectCache(folder=tmp_path / "cache", limit_bytes=10**9)
    expected = store.reader(snapshot, object_cache=cache).fetch(1)
    cached = sorted(cache.folder.iterdir())
    (record,) = store.commits().values()
    assert {path.name for path in cached} == {d.xxh3_128 for d in record.objects.values()}
    for path in cached:
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    found = store.reader(snapshot, object_cache=cache).fetch(1)
    assert found.target_logsumexp.tobytes() == expected.target_logsumexp.tobytes()
    assert found.aux_hidden_states.tobytes() == expected.aux_hidden_states.tobytes()

    store.root.delete_all("shards")  # now everything comes from the mended cache
    again = store.reader(snapshot, object_cache=cache).fetch(1)
    assert again.aux_hidden_states.tobytes() == expected.aux_hidden_states.tobytes()


def test_bad_remote_bytes_are_neither_kept_nor_served(root: str, tmp_path: Path) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(2)
    fill(store, samples, shard_tokens=10**6)
    snapshot = store.publish([sample.sample_id for sample in samples])
    (record,) = store.commits().values()
    key = data_key(store, record.shard_id)
    whole = store.root.read(key)
    store.root.write(key, whole[:-1] + bytes([whole[-1] ^ 1]))
    cache = ObjectCache(folder=tmp_path / "cache", limit_bytes=10**9)
    with pytest.raises(ShardCorruptError, match="eyas repair"):
        store.reader(snapshot, object_cache=cache).fetch(0)
    (digest,) = record.objects.values()
    assert not (cache.folder / digest.xxh3_128).exists()
    store.root.write(key, whole)
    assert store.reader(snapshot, object_cache=cache).fetch(0).sample_id in record.sample_ids


def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = ObjectCache(folder=tmp_path / "file", limit_bytes=10)
    with pytest.raises(ConfigError, match="as an object cache"):
        cache.fetch(ObjectDigest.of(b"x"), lambda: b"x")


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    digest = ObjectDigest.of(b"x")
    (tmp_path / f"{digest.xxh3_128}.tmp").symlink_to(full)
    cache = ObjectCache(folder=tmp_path, limit_bytes=10)
    with pytest.raises(OutOfSpaceError, match="lower its limit"):
        cache.fetch(digest, lambda: b"x")
    assert list(tmp_path.iterdir()) == []
