"""SIGKILL at any moment, then the same command again: the very bytes of an uninterrupted run."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests

WRITER = """
import sys
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples
store = Store.create(sys.argv[1], make_identity())
samples = make_samples(60)
print("writing", flush=True)
fill(store, samples, shard_tokens=60)
store.publish([sample.sample_id for sample in samples])
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    samples = make_samples(60)
    whole = Store.create(str(tmp_path / "whole"), make_identity())
    began = time.monotonic()
    fill(whole, samples, shard_tokens=60)
    whole.publish([sample.sample_id for sample in samples])
    whole_seconds = time.monotonic() - began

    root = str(tmp_path / "killed")
    rng = random.Random(4)  # noqa: S311
    kills = 0
    committed: dict[str, str] = {}
    for _ in range(40):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, root], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout
        writer.stdout.readline()
        try:
            writer.wait(timeout=rng.uniform(0, whole_seconds / 3))
        except subprocess.TimeoutExpired:
            writer.send_signal(signal.SIGKILL)
            kills += 1
        code = writer.wait()
        writer.stdout.close()
        store = Store.open(root)
        records = {key: record.to_json().hex() for key, record in store.commits().items()}
        assert committed.items() <= records.items(), "a kill lost a committed shard"
        assert store.verify(deep=True) == []
        committed = records
        if code == 0:
            break
    assert code == 0
    assert kills >= 2
    assert tree_digests(Store.open(root)) == tree_digests(whole)
