"""SIGKILL at any moment, then the same command again: the very bytes of an uninterrupted run."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.errors import ConfigError
from storage.maintenance.verify import verify_store
from storage.records import keys
from storage.store import Store
from tests.storage.synthetic import drop_leftovers, make_identity, tree_digests

KILLS = 50

# Imports once, then forks a writer for each order; it has no threads that a fork would lose.
NURSERY = """
import json, os, signal, sys, time
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples
samples = make_samples(40)
for line in sys.stdin:
    root, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        store = Store.create(root, make_identity())
        fill(store, samples, shard_tokens=60)
        store.publish([sample.sample_id for sample in samples])
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # it is not reaped yet, so the id is still its own
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts writers that cost nothing to start."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin
        assert process.stdout
        self._orders, self._answers = process.stdin, process.stdout

    def write(self, root: Path, *, seconds: float | None = None) -> bool:
        """Let one write to the end or for so long; tell whether it was killed."""
        self._orders.write(json.dumps([str(root), seconds]) + "\n")
        self._orders.flush()
        exit_code = int(self._answers.readline())
        assert exit_code in (0, -signal.SIGKILL)
        return exit_code != 0


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with started_nursery() as nursery:
        yield nursery


@contextmanager
def started_nursery() -> Iterator[Nursery]:
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Nursery(process)
        finally:
            process.kill()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(nursery: Nursery, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    nursery.write(undisturbed)
    began = time.monotonic()
    nursery.write(tmp_path / "timed")
    whole_seconds = time.monotonic() - began
    expected = tree_digests(Store.open(str(undisturbed)))

    rng = random.Random(4)  # noqa: S311
    kills = stores = 0
    while kills < KILLS:
        root = tmp_path / f"killed-{stores}"
        committed: dict[str, bytes] = {}
        # Of a store that is killed 25 times on average, so that kills fall on all of its life.
        while nursery.write(root, seconds=rng.uniform(0, 2 * whole_seconds / 25)):
            kills += 1
            committed = require_sound(root, committed)
            if kills == KILLS:
                nursery.write(root)
                break
        store = Store.open(str(root))
        drop_leftovers(store)
        assert tree_digests(store) == expected
        stores += 1
    assert kills == KILLS


def require_sound(root: Path, committed: dict[str, bytes]) -> dict[str, bytes]:
    """Raise unless all that was committed still is and all that is visible is whole."""
    try:
        store = Store.open(str(root))
    except ConfigError:  # killed before it had made the store
        assert not committed
        return committed
    records = {name: record.to_json() for name, record in store.commits().items()}
    assert committed.items() <= records.items(), "a kill lost a committed shard"
    findings = {finding.object_key for finding in verify_store(store, deep=True)}
    assert findings <= {keys.LATEST}, "a kill left something visible that is not whole"
    assert store.identity == make_identity()
    assert all(plan.shards for plan in store.plans.all())
    return records
