"""Several processes on one store: nobody loses data, one shard has one writer at a time."""

import subprocess
import sys
from pathlib import Path

from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests

WRITER = """
import sys
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples
fill(Store.create(sys.argv[1], make_identity()), make_samples(20))
"""


def test_writers_of_the_same_shards_end_in_one_valid_store(tmp_path: Path) -> None:
    root = str(tmp_path / "shared")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, root]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    alone = Store.create(str(tmp_path / "alone"), make_identity())
    fill(alone, make_samples(20))
    store = Store.open(root)
    assert store.verify(deep=True) == []
    assert store.commits() == alone.commits()
    shards = {k: v for k, v in tree_digests(store).items() if not k.startswith("plans/")}
    assert shards == {k: v for k, v in tree_digests(alone).items() if not k.startswith("plans/")}
