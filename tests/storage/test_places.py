"""The same promises wherever the store lies: a disk, memory, an S3 server."""

from pathlib import Path

import numpy as np
import pytest

from storage.errors import ConfigError, CorruptError, MismatchError
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests


def test_conforms(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no store at"):
        Store.open(root)
    store = Store.create(root, make_identity())
    samples = make_samples(8)
    fill(store, samples, shard_tokens=100)
    before = tree_digests(store)
    fill(store, samples, shard_tokens=100)
    assert tree_digests(store) == before
    snapshot = store.publish([sample.sample_id for sample in samples])
    reader = Store.open(root).reader(store.snapshot(snapshot.snapshot_id))
    by_id = {sample.sample_id: sample for sample in samples}
    for index in range(len(reader)):
        found = reader.fetch(index)
        np.testing.assert_array_equal(
            found.aux_hidden_states, by_id[found.sample_id].aux_hidden_states
        )
    assert store.verify(deep=True) == []
    with pytest.raises(MismatchError, match="hidden_size"):
        Store.create(root, make_identity(hidden_size=32))

    local = Store.create(str(tmp_path / "local"), make_identity())
    fill(local, samples, shard_tokens=100)
    assert tree_digests(local) == before, "bytes depend on the place"


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_found_and_repaired(root: str, damage: str) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(4)
    fill(store, samples, shard_tokens=10**6)
    snapshot = store.publish([sample.sample_id for sample in samples])
    whole = tree_digests(store)
    record = next(iter(store.commits().values()))
    key = f"shards/{record.shard_id}/aux_hidden_states_mantissas/c/0/0/0"
    data = store.root.read(key)
    if damage == "delete":
        store.root.delete(key)
    elif damage == "truncate":
        store.root.write(key, data[:-1])
    else:
        store.root.write(key, bytes([data[0] ^ 1]) + data[1:])
    assert [finding.object_key for finding in store.verify(deep=True)] == [key]
    with pytest.raises(CorruptError, match="eyas repair"):
        store.reader(snapshot).fetch(0)
    store.revoke(record.shard_id)
    fill(store, samples, shard_tokens=10**6)
    assert tree_digests(store) == whole
