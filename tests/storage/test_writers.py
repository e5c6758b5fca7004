"""Several writers on one store: nobody loses data, a shard ends as one of their versions, whole."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import TransientError
from storage.recompute import Recompute
from storage.samples import StoredSample
from storage.store import Store
from storage.writer import ROUNDS
from tests.storage.steps import SteppedDirectory
from tests.storage.synthetic import fill, make_identity, make_samples, planned, tree_digests

WRITER = """
import sys
from dataclasses import replace
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
    assert store.verify(deep=True) == []
    assert store.commits() == alone.commits()
    shards = {k: v for k, v in tree_digests(store).items() if not k.startswith("plans/")}
    assert shards == {k: v for k, v in tree_digests(alone).items() if not k.startswith("plans/")}


@pytest.mark.s3
def test_processes_with_different_bytes_on_s3_end_in_one_valid_store(s3_root: str) -> None:
    run_writers(s3_root, [0, 1, 2])
    store = Store.open(s3_root)
    assert store.verify(deep=True) == []
    assert store.committed_samples() == {sample.sample_id for sample in make_samples(20)}


class Rivalry:
    """Two versions of one shard, written into one store."""

    def __init__(self, root: str) -> None:
        self.store = Store.create(root, make_identity())
        samples = make_samples(2, tokens=(5, 9))
        other = [replace(s, target_logsumexp=s.target_logsumexp + 1) for s in samples]
        self.versions = (samples, other)
        (self.shard,) = self.store.plan(planned(samples), shard_tokens=10**6).shards

    def write(self, version: int, store: Store | None = None) -> None:
        # Nothing is asked of it, for there is no probe; but what was written is read again.
        unasked = cast("Recompute", object())
        (store or self.store).write_shard(self.shard, self.versions[version], recompute=unasked)

    def require_whole(self) -> None:
        """Raise unless exactly one of the versions stands."""
        assert self.store.verify(deep=True) == []
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
        root = SteppedDirectory.over(rivalry.store.root, lambda _: turns.take(me))
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


def test_a_late_rival_takes_nothing_away(remote_root: str) -> None:
    """Wherever it stands when another commits: from then on the shard is never less than whole."""
    for paused_at in range(0, 200, stride(remote_root)):
        rivalry = Rivalry(f"{remote_root}/{paused_at}")
        steps = _write_while_another_commits(rivalry, paused_at=paused_at)
        rivalry.require_whole()
        if steps < paused_at:  # it had ended before the pause
            return
    pytest.fail("the writer took more steps than expected")


def stride(root: str) -> int:
    """Return how many steps of a writer to skip between two tries: a server is slow."""
    return 1 if root.startswith("memory") else 9


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
            assert rivalry.store.verify(deep=False) == []
        steps += 1

    stepped = SteppedDirectory.over(rivalry.store.root, step)
    rivalry.write(0, Store(stepped, rivalry.store.identity))
    return steps


class Killed(BaseException):
    """What a kill is to the code that it ends: nothing can catch it."""


def test_a_killed_rival_leaves_nothing_that_reads_wrong(remote_root: str) -> None:
    """It dies at each of its steps, after the other has committed other bytes."""
    for last in range(0, 200, stride(remote_root)):
        rivalry = Rivalry(f"{remote_root}/{last}")
        if _is_killed_after_another_commits(rivalry, last=last):
            damaged = rivalry.store.verify(deep=True)
            for finding in damaged:
                rivalry.store.revoke(finding.shard_id or "")
            rivalry.write(0)
            rivalry.require_whole()
        else:
            rivalry.require_whole()
            return
    pytest.fail("the writer took more steps than expected")


def _is_killed_after_another_commits(rivalry: Rivalry, *, last: int) -> bool:
    steps = 0

    @contextmanager
    def step(name: str) -> Iterator[None]:
        nonlocal steps
        if name.startswith("write shards/") and name.endswith("/zarr.json") and steps < 1000:
            steps = 1000  # the other commits at the worst moment: just before the first object
            rivalry.write(0)
        if steps == 1000 + last:
            raise Killed
        yield
        steps += steps >= 1000

    stepped = SteppedDirectory.over(rivalry.store.root, step)
    try:
        rivalry.write(1, Store(stepped, rivalry.store.identity))
    except Killed:
        return True
    return False


def test_endless_rivals_are_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    rivalry = Rivalry(f"memory://{tmp_path.name}")
    disturbed = 0

    @contextmanager
    def step(name: str) -> Iterator[None]:
        nonlocal disturbed
        yield
        if name.startswith("write commits/"):
            disturbed += 1
            rivalry.store.root.delete(f"shards/{rivalry.shard.shard_id}/zarr.json")

    stepped = SteppedDirectory.over(rivalry.store.root, step)
    with pytest.raises(TransientError, match="end all runs on this store but one"):
        rivalry.write(0, Store(stepped, rivalry.store.identity))
    assert disturbed == ROUNDS


def test_two_creators_of_different_stores_do_not_mix(remote_root: str) -> None:
    """The second to create learns that the store is not its own, however close they are."""
    ours = Store.create(remote_root, make_identity())
    theirs = make_identity(template_fingerprint="other")
    ours.root.publish("store.json", theirs.to_json(), replace=False)
    assert Store.open(remote_root).identity == ours.identity
    ours.root._create("store.json", theirs.to_json())
    assert Store.open(remote_root).identity == ours.identity
