"""Several writers on one store: nobody loses data, a shard ends as one of their versions, whole."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.maintenance.verify import verify_store
from storage.objects.object_store import ObjectStore
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.steps import SteppedObjectStore
from tests.storage.synthetic import (
    committed_samples,
    fill,
    make_identity,
    make_samples,
    planned,
    tree_digests,
)

WRITER = """
import sys
from dataclasses import dataclass, replace
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples
other = float(sys.argv[2])
samples = [replace(s, target_logsumexp=s.target_logsumexp + other) for s in make_samples(20)]
fill(Store.create(sys.argv[1], make_identity()), samples)
"""


def run_writers(root: str, versions: Sequence[int]) -> None:
    """Let processes write the same shards at the same time, each its version of the states."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, root, str(version)], env=dict(os.environ))
        for version in versions
    ]
    assert [writer.wait() for writer in writers] == [0] * len(versions)


@pytest.mark.slow
def test_processes_on_one_disk_end_in_one_valid_store(tmp_path: Path) -> None:
    root = str(tmp_path / "shared")
    run_writers(root, [0, 0, 0])
    alone = Store.create(str(tmp_path / "alone"), make_identity())
    fill(alone, make_samples(20))
    store = Store.open(root)
    assert verify_store(store, deep=True) == []
    shards = {k: v for k, v in tree_digests(store).items() if not k.startswith("plans/")}
    assert shards == {k: v for k, v in tree_digests(alone).items() if not k.startswith("plans/")}


@pytest.mark.slow
def test_processes_with_different_bytes_on_one_disk_end_in_one_valid_store(tmp_path: Path) -> None:
    """Five processes, many times over: a lock that is not shared would lose now and then."""
    for number in range(5):
        root = str(tmp_path / str(number))
        run_writers(root, [0, 1, 2, 3, 4])
        store = Store.open(root)
        assert verify_store(store, deep=True) == []
        assert committed_samples(store) == {sample.sample_id for sample in make_samples(20)}


@pytest.mark.s3
def test_processes_with_different_bytes_on_s3_end_in_one_valid_store(s3_root: str) -> None:
    run_writers(s3_root, [0, 1, 2])
    store = Store.open(s3_root)
    assert verify_store(store, deep=True) == []
    assert committed_samples(store) == {sample.sample_id for sample in make_samples(20)}


class Rivalry:
    """Two versions of one shard, written into one store."""

    def __init__(self, root: str) -> None:
        self.store = Store.create(root, make_identity())
        samples = make_samples(2, tokens=(5, 9))
        other = [replace(s, target_logsumexp=s.target_logsumexp + 1) for s in samples]
        self.versions = (samples, other)
        (self.shard,) = self.store.plan(planned(samples), shard_tokens=10**6).shards

    def write(self, version: int, store: Store | None = None) -> None:
        (store or self.store).write_shard(self.shard, self.versions[version])

    def require_whole(self) -> None:
        """Raise unless exactly one of the versions stands."""
        assert verify_store(self.store, deep=True) == []
        reader = self.store.reader(self.store.publish(self.shard.sample_ids))
        found = {read.sample_id: read for read in (reader.fetch(0), reader.fetch(1))}
        assert any(self._is(version, found) for version in self.versions)

    @staticmethod
    def _is(version: Sequence[StoredSample], found: dict[str, StoredSample]) -> bool:
        return all(
            (sample.target_logsumexp == found[sample.sample_id].target_logsumexp).all()
            for sample in version
        )


class Turns:
    """Let two writers take one operation each in a given order; then the first that is left."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = list(order)
        self._running = {0, 1}
        self._changed = threading.Condition()

    @contextmanager
    def take(self, me: int) -> Iterator[None]:
        with self._changed:
            assert self._changed.wait_for(lambda: self._next() == me, timeout=60)
            if self._order:
                self._order.pop(0)
            try:
                yield
            finally:
                self._changed.notify_all()

    def leave(self, me: int) -> None:
        with self._changed:
            self._running.discard(me)
            self._changed.notify_all()

    def _next(self) -> int:
        while self._order and self._order[0] not in self._running:
            self._order.pop(0)
        return self._order[0] if self._order else min(self._running)


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.integers(0, 1), min_size=20, max_size=160))
def test_any_order_of_two_versions_ends_in_one_of_them(order: list[int]) -> None:
    MemoryFileSystem.store.clear()
    rivalry = Rivalry("memory://rivals")
    turns = Turns(order)
    failures: list[BaseException] = []

    def work(me: int) -> None:
        root = SteppedObjectStore.over(rivalry.store.root, lambda _: turns.take(me))
        try:
            rivalry.write(me, Store(root, rivalry.store.identity))
        except BaseException as error:  # noqa: BLE001 - the test's own thread reports it
            failures.append(error)
        finally:
            turns.leave(me)

    threads = [threading.Thread(target=work, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    rivalry.require_whole()


def test_a_late_rival_takes_nothing_away(root: str) -> None:
    """Wherever it stands when another commits: from then on the shard is never less than whole."""
    for paused_at in range(40):
        rivalry = Rivalry(f"{root}/{paused_at}")
        steps = _write_while_another_commits(rivalry, paused_at=paused_at)
        rivalry.require_whole()
        if steps < paused_at:  # it had ended before the pause
            assert paused_at > 3
            return
    pytest.fail("the writer took more steps than expected")


def _write_while_another_commits(rivalry: Rivalry, *, paused_at: int) -> int:
    steps = 0

    @contextmanager
    def step(_: str) -> Iterator[None]:
        nonlocal steps
        if steps == paused_at:
            rivalry.write(0)
        yield
        if steps >= paused_at:
            assert rivalry.store.shard_ids() == [rivalry.shard.shard_id]
            assert verify_store(rivalry.store, deep=False) == []
        steps += 1

    stepped = SteppedObjectStore.over(rivalry.store.root, step)
    rivalry.write(0, Store(stepped, rivalry.store.identity))
    return steps


class Killed(BaseException):
    """What a kill is to the code that it ends: nothing can catch it."""


def test_a_killed_rival_leaves_nothing_that_reads_wrong(root: str) -> None:
    """It dies at each of its steps, after the other has committed other bytes."""
    for last in range(40):
        rivalry = Rivalry(f"{root}/{last}")
        was_killed = _is_killed_after_another_commits(rivalry, last=last)
        assert verify_store(rivalry.store, deep=True) == []
        rivalry.write(0)
        rivalry.require_whole()
        if not was_killed:
            assert last > 2
            return
    pytest.fail("the writer took more steps than expected")


def _is_killed_after_another_commits(rivalry: Rivalry, *, last: int) -> bool:
    steps = 0

    @contextmanager
    def step(name: str) -> Iterator[None]:
        nonlocal steps
        if name.startswith(("open shards/", "write shards/")) and steps < 1000:
            steps = 1000  # the other commits after this one has looked, and before its data
            rivalry.write(0)
        if steps == 1000 + last:
            raise Killed
        yield
        steps += steps >= 1000

    stepped = SteppedObjectStore.over(rivalry.store.root, step)
    try:
        rivalry.write(1, Store(stepped, rivalry.store.identity))
    except Killed:
        return True
    return False


@dataclass(frozen=True, slots=True)
class StaleObjectStore(ObjectStore):
    """One host's view of a shared disk: what others wrote since is not seen yet."""

    def read(self, key: str) -> bytes:
        if key.startswith("commits/"):
            raise FileNotFoundError(key)
        return ObjectStore.read(self, key)

    def exists(self, key: str) -> bool:
        return not key.startswith("commits/") and ObjectStore.exists(self, key)


def test_a_host_that_does_not_see_the_other_yet_breaks_nothing(tmp_path: Path) -> None:
    """As on NFS, where locks and looks are each host's own, but a link is made once."""
    rivalry = Rivalry(str(tmp_path / "store"))
    rivalry.write(0)
    behind = StaleObjectStore(rivalry.store.root.file_system, rivalry.store.root.root)
    rivalry.write(1, Store(behind, rivalry.store.identity))
    rivalry.require_whole()


def test_a_record_without_its_data_is_replaced(root: str) -> None:
    rivalry = Rivalry(root)
    rivalry.write(0)
    rivalry.store.root.delete_all(f"shards/{rivalry.shard.shard_id}")
    rivalry.write(1)
    rivalry.require_whole()


def test_an_attempt_that_comes_second_leaves_nothing(root: str) -> None:
    rivalry = Rivalry(root)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        if name.startswith(("create commits/", "name commits/")):
            rivalry.write(0)
        yield

    stepped = SteppedObjectStore.over(rivalry.store.root, step)
    rivalry.write(1, Store(stepped, rivalry.store.identity))
    rivalry.require_whole()
    record = rivalry.store.commit(rivalry.shard.shard_id)
    assert rivalry.store.root.sizes(f"shards/{record.shard_id}").keys() == record.objects.keys()


def test_two_creators_of_different_stores_do_not_mix(remote_root: str) -> None:
    """The second to create learns that the store is not its own, however close they are."""
    ours = Store.create(remote_root, make_identity())
    theirs = make_identity(template_fingerprint="other")
    assert not ours.root.create("store.json", theirs.to_json())
    assert Store.open(remote_root).identity == ours.identity
    assert not ours.root._create_on_server("store.json", theirs.to_json())
    assert Store.open(remote_root).identity == ours.identity
