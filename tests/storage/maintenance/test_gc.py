"""Collection keeps what snapshots and unfinished plans need; repair remakes what is damaged."""

from pathlib import Path

import pytest

from storage.errors import ConfigError
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.repair import damaged_shards
from storage.maintenance.verify import verify_store
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.synthetic import (
    data_key,
    fill,
    make_identity,
    make_samples,
    planned,
    tree_digests,
)


def test_drops_only_what_nothing_needs(filled: Store, samples: list[StoredSample]) -> None:
    old = filled.snapshot()
    few = [sample.sample_id for sample in samples[:3]]
    latest = filled.publish(few)
    with pytest.raises(ConfigError, match="is the latest snapshot"):
        find_garbage(filled, keep=[old.snapshot_id], older_than_hours=0)
    with pytest.raises(ConfigError, match="has no snapshot feed"):
        find_garbage(filled, keep=["feed"], older_than_hours=0)
    assert find_garbage(filled, keep=filled.snapshot_ids(), older_than_hours=0).shard_ids == ()
    garbage = find_garbage(filled, keep=[latest.snapshot_id], older_than_hours=0)
    assert garbage.snapshot_ids == (old.snapshot_id,)
    assert set(garbage.shard_ids) == filled.commits().keys() - set(latest.shard_ids)
    collect(filled, garbage)
    assert verify_store(filled, deep=True) == []
    assert filled.commits().keys() == set(latest.shard_ids)
    assert filled.plans.unfinished() == []
    reader = filled.reader(filled.snapshot())
    assert {reader.fetch(i).sample_id for i in range(len(reader))} == set(few)


def test_keeps_what_an_unfinished_plan_has_made(filled: Store) -> None:
    more = make_samples(6, seed=8)
    plan = filled.plan(planned(more), shard_tokens=60)
    by_id = {sample.sample_id: sample for sample in more}
    filled.write_shard(plan.shards[0], [by_id[i] for i in plan.shards[0].sample_ids])
    assert find_garbage(filled, keep=filled.snapshot_ids(), older_than_hours=0).shard_ids == ()


def test_keeps_a_finished_plan_until_it_is_published(tmp_path: Path) -> None:
    """Between the last shard and the snapshot nothing else says that it is needed."""
    store = Store.create(str(tmp_path / "s"), make_identity())
    first, more = make_samples(6, seed=1), make_samples(6, seed=8)
    fill(store, first, shard_tokens=60)
    assert not find_garbage(store, keep=[], older_than_hours=0)
    old = store.publish([sample.sample_id for sample in first])
    fill(store, more, shard_tokens=60)
    assert not find_garbage(store, keep=[old.snapshot_id], older_than_hours=0)
    given_up = find_garbage(
        store, keep=[old.snapshot_id], keep_unfinished=False, older_than_hours=0
    )
    assert set(given_up.shard_ids) == set(store.shard_ids()) - set(old.shard_ids)

    new = store.publish([sample.sample_id for sample in more])
    assert set(find_garbage(store, keep=[new.snapshot_id], older_than_hours=0).shard_ids) == set(
        old.shard_ids
    )


def test_a_damaged_snapshot_goes_and_its_shards_stay(filled: Store) -> None:
    more = make_samples(6, seed=8)
    fill(filled, more, shard_tokens=60)
    old = filled.snapshot()
    latest = filled.publish([sample.sample_id for sample in more])
    path = Path(filled.root.root) / "snapshots" / f"{old.snapshot_id}.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    kept = snapshots_to_keep(filled, older_than_hours=0)
    assert list(kept) == [latest.snapshot_id]
    garbage = find_garbage(filled, keep=kept, older_than_hours=0)
    assert (garbage.snapshot_ids, garbage.shard_ids) == ((old.snapshot_id,), ())
    collect(filled, garbage)
    assert verify_store(filled, deep=True) == []
    assert not find_garbage(
        filled, keep=kept, older_than_hours=0
    )  # to be published again by its own recipe


@pytest.mark.parametrize("source", ["record", "plan", "snapshot"])
def test_repair_remakes_the_same_shard(
    filled: Store, samples: list[StoredSample], source: str
) -> None:
    root = Path(filled.root.root)
    record = next(iter(filled.commits().values()))
    whole = tree_digests(filled)
    (root / data_key(filled, record.shard_id)).unlink()
    if source != "record":
        (root / "commits" / f"{record.shard_id}.json").write_bytes(b"{}")
    if source == "snapshot":
        for path in (root / "plans").iterdir():
            path.unlink()
        whole = {key: value for key, value in whole.items() if not key.startswith("plans/")}
    (shard,) = damaged_shards(filled, verify_store(filled, deep=True))
    assert shard.sample_ids == record.sample_ids
    filled.revoke(shard.shard_id)
    by_id = {sample.sample_id: sample for sample in samples}
    filled.write_shard(shard, [by_id[i] for i in shard.sample_ids])
    assert tree_digests(filled) == whole


def test_a_damaged_snapshot_stops_no_repair(filled: Store, samples: list[StoredSample]) -> None:
    """Another snapshot tells what a shard held that neither a record nor a plan does any more."""
    root = Path(filled.root.root)
    whole = filled.snapshot().snapshot_id
    parts = [filled.publish([s.sample_id], as_latest=False).snapshot_id for s in samples]
    first = min(parts)
    assert first < whole, "it is looked at before"
    (root / "snapshots" / f"{first}.parquet").write_bytes(b"damaged")
    for path in (root / "plans").iterdir():
        path.unlink()
    shard_id = filled.shard_ids()[0]
    (root / "commits" / f"{shard_id}.json").write_bytes(b"{}")
    (shard,) = damaged_shards(filled, verify_store(filled, deep=False))
    assert shard.shard_id == shard_id


def test_a_shard_that_stays_is_still_planned(tmp_path: Path) -> None:
    """Though another shard of its plan went, and no whole snapshot of it is left."""
    store = Store.create(str(tmp_path / "s"), make_identity())
    samples = make_samples(6, tokens=(12, 13))
    fill(store, samples, shard_tokens=24)
    store.publish([sample.sample_id for sample in samples])
    part = store.publish([samples[0].sample_id])
    collect(store, find_garbage(store, keep=[part.snapshot_id], older_than_hours=0))
    (shard_id,) = part.shard_ids
    store.root.write(f"commits/{shard_id}.json", b"{}")
    (shard,) = damaged_shards(store, verify_store(store, deep=True))
    assert shard.shard_id == shard_id
    assert find_garbage(store, keep=[part.snapshot_id], older_than_hours=0).plan_ids == ()
