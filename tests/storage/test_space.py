"""A full disk is a clear error and leaves nothing half-visible."""

import subprocess
import sys
from pathlib import Path

from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests

LIMITED = """
import resource, sys
from storage.errors import OutOfSpaceError
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples
store = Store.create(sys.argv[1], make_identity())
samples = make_samples(4)
store.plan([], shard_tokens=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    fill(store, samples, shard_tokens=10**6)
except OutOfSpaceError as error:
    sys.exit(str(error))
"""


def test_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, root], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no space left to write" in done.stderr
    assert "free space" in done.stderr
    store = Store.open(root)
    assert not store.commits()
    assert not [key for key in tree_digests(store) if key.startswith("shards/")]

    fill(store, make_samples(4), shard_tokens=10**6)
    whole = Store.create(str(tmp_path / "whole"), make_identity())
    fill(whole, make_samples(4), shard_tokens=10**6)
    assert tree_digests(store) == tree_digests(whole)
