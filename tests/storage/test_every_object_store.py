"""The same promises wherever the store lies: a disk, memory, an S3 server."""

from pathlib import Path

import numpy as np
import pytest

from storage.errors import ConfigError, CorruptError, MismatchError, ShardMissingError
from storage.maintenance.gc import collect, find_garbage
from storage.maintenance.repair import damaged_shards
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.storage.synthetic import (
    data_key,
    drop_leftovers,
    fill,
    make_identity,
    make_samples,
    planned,
    shard_sizes,
    tree_digests,
)


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
    assert verify_store(store, deep=True) == []
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
    key = data_key(store, record.shard_id)
    data = store.root.read(key)
    if damage == "delete":
        store.root.delete(key)
    elif damage == "truncate":
        store.root.write(key, data[:-1])
    else:
        store.root.write(key, bytes([data[0] ^ 1]) + data[1:])
    assert [finding.object_key for finding in verify_store(store, deep=True)] == [key]
    with pytest.raises(CorruptError, match="eyas repair"):
        store.reader(snapshot).fetch(0)
    store.revoke(record.shard_id)
    fill(store, samples, shard_tokens=10**6)
    drop_leftovers(store)
    assert tree_digests(store) == whole


def test_a_plan_is_resumed_and_only_what_is_new_is_planned(root: str) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(6)
    by_id = {sample.sample_id: sample for sample in samples}
    plan = store.plan(planned(samples), shard_tokens=80)
    first, *others = plan.shards
    assert others
    store.write_shard(first, [by_id[sample_id] for sample_id in first.sample_ids])
    again = Store.open(root)
    assert [found for found, _ in again.plans.unfinished()] == [plan]
    assert again.plan(planned(samples), shard_tokens=99) == plan
    assert again.plans.missing(plan) == tuple(others)
    with pytest.raises(ConfigError, match="no committed shard"):
        again.publish(by_id)
    fill(again, samples, shard_tokens=80)
    more = [*samples, *make_samples(1, seed=5)]
    (fresh,) = again.plan(planned(more), shard_tokens=80).shards
    assert fresh.sample_ids == (more[-1].sample_id,)


def test_snapshots_are_kept_and_the_latest_is_named(root: str) -> None:
    store = Store.create(root, make_identity())
    with pytest.raises(ConfigError, match="no snapshot yet"):
        store.snapshot()
    samples = make_samples(4)
    fill(store, samples, shard_tokens=80)
    whole = store.publish([sample.sample_id for sample in samples])
    part = store.publish([sample.sample_id for sample in samples[:2]])
    assert store.snapshot().snapshot_id == part.snapshot_id
    assert store.snapshot_ids() == sorted([whole.snapshot_id, part.snapshot_id])
    assert len(store.reader(store.snapshot(whole.snapshot_id))) == len(samples)
    key = f"snapshots/{part.snapshot_id}.parquet"
    data = store.root.read(key)
    store.root.write(key, data[:-9])
    with pytest.raises(CorruptError, match=part.snapshot_id):
        store.snapshot()
    assert [finding.object_key for finding in verify_store(store, deep=False)] == [key]


def test_repair_remakes_the_same_shard_even_without_its_record(root: str) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(4)
    by_id = {sample.sample_id: sample for sample in samples}
    fill(store, samples, shard_tokens=80)
    store.publish(by_id)
    whole = tree_digests(store)
    damaged = store.shard_ids()[0]
    store.root.delete(data_key(store, damaged))
    store.root.write(f"commits/{damaged}.json", b"{}")
    (shard,) = damaged_shards(store, verify_store(store, deep=True))
    store.revoke(shard.shard_id)
    store.write_shard(shard, [by_id[sample_id] for sample_id in shard.sample_ids])
    assert tree_digests(store) == whole


def test_collection_drops_only_what_no_kept_snapshot_needs(root: str) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(6)
    fill(store, samples, shard_tokens=60)
    store.publish([sample.sample_id for sample in samples])
    kept = store.publish([samples[0].sample_id])
    before = set(store.shard_ids())
    collect(store, find_garbage(store, keep=[kept.snapshot_id], older_than_hours=0))
    assert set(store.shard_ids()) == set(kept.shard_ids) < before
    assert shard_sizes(store).keys() == set(kept.shard_ids)
    assert verify_store(store, deep=True) == []
    assert store.reader(store.snapshot()).fetch(0).sample_id == samples[0].sample_id


def test_many_records_are_read_at_once(root: str) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(8)
    fill(store, samples, shard_tokens=40)
    records = store.commits()
    assert len(records) > 3
    assert records == {shard_id: store.commit(shard_id) for shard_id in store.shard_ids()}
    keys = [f"commits/{shard_id}.json" for shard_id in records]
    assert store.root.read_many(keys) == {key: store.root.read(key) for key in keys}
    with pytest.raises(FileNotFoundError):
        store.root.read_many([*keys, "commits/absent.json"])
    some = sorted(records)[1:3]
    assert store.some_commits(some) == {shard_id: records[shard_id] for shard_id in some}
    assert store.some_commits([]) == {}
    with pytest.raises(ShardMissingError, match=r"ffff.*eyas repair"):
        store.some_commits([*some, "f" * 32])


def test_an_incomplete_snapshot_is_known_before_it_is_read(root: str) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(8)
    fill(store, samples, shard_tokens=40)
    snapshot = store.publish([sample.sample_id for sample in samples])
    store.require_present(snapshot)
    record = store.commit(snapshot.shard_ids[-1])
    key = f"shards/{record.shard_id}/{max(record.objects)}"
    store.root.write(key, store.root.read(key)[:-1])
    with pytest.raises(ShardMissingError, match=rf"1 objects .*{key}: has \d+ bytes.*eyas repair"):
        store.require_present(snapshot)
    store.root.delete(key)
    with pytest.raises(ShardMissingError, match=f"{key}: is missing"):
        store.require_present(snapshot)
    store.revoke(record.shard_id)
    with pytest.raises(ShardMissingError, match=f"no commit record, first {record.shard_id}"):
        store.require_present(snapshot)
