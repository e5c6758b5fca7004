"""The object cache never exceeds its limit, evicts only its own, and never serves bad bytes."""

import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ConfigError, OutOfSpaceError, ShardCorruptError
from storage.objects.cache_contents import BOOKS
from storage.objects.claims import Claims
from storage.objects.digests import ObjectDigest
from storage.objects.object_cache import ObjectCache
from storage.store import Store
from tests.storage.synthetic import data_key, fill, make_identity, make_samples
from tests.waiting import wait_for

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


def objects(folder: Path) -> list[Path]:
    """Return what the folder holds beside the cache's books."""
    return sorted(path for path in folder.iterdir() if path.name != BOOKS)


def used_bytes(folder: Path) -> int:
    total = 0
    for path in objects(folder):
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
    assert {path.read_bytes() for path in objects(tmp_path)} == {one, three}


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
    assert names(tmp_path) == {"thesis.tex", "photos", ObjectDigest.of(bytes([3]) * 60).xxh3_128}
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
    cached = objects(cache.folder)
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
    assert objects(tmp_path) == []


FETCHER = """
import sys, time
from pathlib import Path
from storage.objects.digests import ObjectDigest
from storage.objects.object_cache import ObjectCache
folder, log, mode = map(str, sys.argv[1:])
data = b"wanted" * 1000
def remote():
    with open(log, "a") as file:
        file.write(mode + "\\n")
    while mode == "hang":
        time.sleep(60)
    return data
found = ObjectCache(folder=Path(folder), limit_bytes=10**6).fetch(ObjectDigest.of(data), remote)
assert found == data
"""


def fetcher(folder: Path, log: Path, mode: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", FETCHER, str(folder), str(log), mode])


class WatchedClaims(Claims):
    """Counts who asks for a claim."""

    asked: ClassVar[threading.Semaphore]

    def claim(self, name: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        self.asked.release()
        return super().claim(name, wait=wait)


def test_what_many_threads_miss_is_fetched_once(tmp_path: Path) -> None:
    WatchedClaims.asked = threading.Semaphore(0)
    cache = ObjectCache(folder=tmp_path / "cache", limit_bytes=10**6)
    cache._claims = WatchedClaims(folder=cache.folder / BOOKS)
    data = b"wanted" * 1000
    fetched: list[int] = []

    def remote() -> bytes:
        fetched.append(1)
        for _ in range(8):  # all have missed it
            if not WatchedClaims.asked.acquire(timeout=10):
                break
        return data

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: cache.fetch(ObjectDigest.of(data), remote), range(8))
        assert set(found) == {data}
    assert len(fetched) == 1


@pytest.mark.slow
def test_what_several_processes_miss_is_fetched_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    children = [fetcher(tmp_path / "cache", log, f"rank {number}") for number in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_killed_download_blocks_nobody(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = fetcher(tmp_path / "cache", log, "hang")
    wait_for(log.exists, what="the first process to download")
    second = fetcher(tmp_path / "cache", log, "second")
    first.kill()
    first.wait()
    assert second.wait() == 0
    assert log.read_text().splitlines() == ["hang", "second"]


def test_a_failed_download_is_left_to_the_next(tmp_path: Path) -> None:
    cache = ObjectCache(folder=tmp_path / "cache", limit_bytes=100)

    def remote() -> bytes:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        cache.fetch(ObjectDigest.of(b"x"), remote)
    assert cache.fetch(ObjectDigest.of(b"x"), lambda: b"x") == b"x"


def test_a_claim_has_one_holder(tmp_path: Path) -> None:
    claims = Claims(folder=tmp_path / "claims")

    def is_free(name: str) -> bool:
        with claims.claim(name, wait=False) as is_held:
            return is_held

    with claims.claim("one") as is_held:
        assert is_held
        assert not is_free("one")
        assert is_free("two")
    assert is_free("one")
    assert len(list(claims.folder.iterdir())) == 2


def test_what_was_used_since_the_listing_is_kept(tmp_path: Path) -> None:
    cache = ObjectCache(folder=tmp_path, limit_bytes=30)
    values = [bytes([byte]) * 10 for byte in range(5)]
    for number, data in enumerate(values[:4]):  # the last one evicts the first, by a listing
        keep(cache, data)
        path = tmp_path / ObjectDigest.of(data).xxh3_128
        os.utime(path, ns=(number, number))
    keep(cache, values[1])
    keep(cache, values[4])
    assert {path.read_bytes() for path in objects(tmp_path)} == {values[1], values[3], values[4]}


def test_a_change_that_broke_off_is_noticed(tmp_path: Path) -> None:
    """Even if the clock of the file system is too coarse to show that the folder has changed."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    cache = ObjectCache(folder=tmp_path, limit_bytes=30)
    *values, lost, last = (bytes([byte]) * 10 for byte in range(6))
    for data in values:  # the fourth evicts the first, and a listing says what is next
        keep(cache, data)
    modified = tmp_path.stat().st_mtime_ns
    (tmp_path / f"{ObjectDigest.of(lost).xxh3_128}.tmp").symlink_to(full)
    os.utime(tmp_path, ns=(modified, modified))
    with pytest.raises(OutOfSpaceError):
        keep(cache, lost)
    os.utime(tmp_path, ns=(modified, modified))
    assert used_bytes(tmp_path) == 20
    keep(cache, last)
    assert used_bytes(tmp_path) == 30


def test_the_folder_is_not_listed_for_each_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ObjectCache(folder=tmp_path, limit_bytes=1000)
    listings: list[object] = []
    scandir = os.scandir

    def counted(path: Path) -> object:
        listings.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    for number in range(500):
        keep(cache, number.to_bytes(2, "big") * 5)
    monkeypatch.undo()
    assert used_bytes(tmp_path) == 1000
    assert len(listings) <= 1 + 500 // 100  # each listing gives a hundred to evict


def keep(cache: ObjectCache, data: bytes) -> None:
    assert cache.fetch(ObjectDigest.of(data), lambda: data) == data


def test_objects_deleted_by_others_make_room(tmp_path: Path) -> None:
    """Nothing is evicted for bytes that are gone."""
    cache = ObjectCache(folder=tmp_path, limit_bytes=30)
    values = [bytes([byte]) * 10 for byte in range(5)]
    for data in values[:3]:
        keep(cache, data)
    for data in values[:2]:
        (tmp_path / ObjectDigest.of(data).xxh3_128).unlink()
    for data in values[3:]:
        keep(cache, data)
    assert {path.read_bytes() for path in objects(tmp_path)} == set(values[2:])


def test_objects_of_others_count(tmp_path: Path) -> None:
    """As those of an earlier version do, which writes down no total."""
    cache = ObjectCache(folder=tmp_path, limit_bytes=30)
    keep(cache, bytes([1]) * 10)
    for byte in (2, 3):
        data = bytes([byte]) * 10
        (tmp_path / ObjectDigest.of(data).xxh3_128).write_bytes(data)
    keep(cache, bytes([4]) * 10)
    assert used_bytes(tmp_path) == 30
    assert not (tmp_path / ObjectDigest.of(bytes([1]) * 10).xxh3_128).exists()


def test_two_caches_of_one_folder_count_together(tmp_path: Path) -> None:
    caches = [ObjectCache(folder=tmp_path, limit_bytes=100) for _ in range(2)]
    for number in range(60):
        keep(caches[number % 2], number.to_bytes(2, "big") * 5)
        assert used_bytes(tmp_path) == min(100, 10 * (number + 1))
    youngest = {ObjectDigest.of(n.to_bytes(2, "big") * 5).xxh3_128 for n in range(50, 60)}
    assert names(tmp_path) == youngest


@pytest.mark.slow
def test_killed_processes_leave_no_wrong_total(tmp_path: Path) -> None:
    endless = FILLER.replace("range(50)", "itertools.cycle(range(50))")
    for turn in range(5):
        before = names(tmp_path)
        child = subprocess.Popen(
            [sys.executable, "-c", f"import itertools\n{endless}", str(tmp_path), str(turn)]
        )
        wait_for(
            lambda before=before: bool(names(tmp_path) - before),  # type: ignore[misc]
            what="the process to fill the cache",
            every_seconds=0.01,
        )
        child.kill()
        child.wait()
        cache = ObjectCache(folder=tmp_path, limit_bytes=5 * 2**20)
        keep(cache, bytes([turn, 255]) * 2**19)
        total = int((tmp_path / BOOKS / "total").read_text().split()[0])
        assert total == used_bytes(tmp_path) <= 5 * 2**20


def names(folder: Path) -> set[str]:
    return {path.name for path in objects(folder)}


def test_a_copy_in_another_process_starts_anew(tmp_path: Path) -> None:
    cache = ObjectCache(folder=tmp_path, limit_bytes=30)
    keep(cache, b"one")
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert (copy.folder, copy.limit_bytes) == (tmp_path, 30)
    keep(copy, b"two")
    assert used_bytes(tmp_path) == 6
