"""SIGKILL at any moment, then the same command again: the very bytes of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests

KILLS = 50
FORKER = """
import os, sys
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples
samples = make_samples(60)
for root in map(str.strip, sys.stdin):
    child = os.fork()  # a fresh interpreter for each life would take most of the time
    if child == 0:
        print(os.getpid(), flush=True)
        store = Store.create(root, make_identity())
        fill(store, samples, shard_tokens=60)
        store.publish([sample.sample_id for sample in samples])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Writers:
    """Processes that fill a store, one after the other."""

    def __init__(self, forker: subprocess.Popen[str]) -> None:
        self._forker = forker

    def live(self, root: Path, seconds: float) -> int:
        """Let one write into `root`, kill it after `seconds`; return its exit status."""
        assert self._forker.stdin
        assert self._forker.stdout
        self._forker.stdin.write(f"{root}\n")
        self._forker.stdin.flush()
        child = int(self._forker.stdout.readline())
        time.sleep(seconds)
        with suppress(ProcessLookupError):  # it is done already
            os.kill(child, signal.SIGKILL)
        return int(self._forker.stdout.readline())


@contextmanager
def writers() -> Iterator[Writers]:
    with subprocess.Popen(
        [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forker:
        yield Writers(forker)


def test_fifty_kills_lose_nothing_committed(tmp_path: Path) -> None:
    samples = make_samples(60)
    whole = Store.create(str(tmp_path / "whole"), make_identity())
    began = time.monotonic()
    fill(whole, samples, shard_tokens=60)
    whole.publish([sample.sample_id for sample in samples])
    longest_life = (time.monotonic() - began) / 12
    expected = tree_digests(whole)

    rng = random.Random(4)  # noqa: S311
    kills = stores = 0
    with writers() as processes:
        while kills < KILLS:  # whenever a store gets full, the next one is begun
            stores += 1
            root = tmp_path / f"killed-{stores}"
            kills += _kill_until_full(processes, root, rng, longest_life)
            assert tree_digests(Store.open(str(root))) == expected
    assert kills / stores >= 4, "the writers lived too long for the test to say much"


def _kill_until_full(
    processes: Writers, root: Path, rng: random.Random, longest_life: float
) -> int:
    """Return how many writers were killed before one came to the end."""
    committed: dict[str, str] = {}
    kills = 0
    while processes.live(root, rng.uniform(0, longest_life)) != 0:
        kills += 1
        if not (root / "store.json").exists():
            continue  # killed before there was a store
        store = Store.open(str(root))
        records = {key: record.to_json().hex() for key, record in store.commits().items()}
        assert committed.items() <= records.items(), "a kill lost a committed shard"
        assert store.verify(deep=True) == []
        committed = records
    return kills
