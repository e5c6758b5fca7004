"""What a collection, a repair or a reader must not do, whatever a store holds or has lost."""

import errno
import os
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from storage.errors import CorruptError, TransientError
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.objects.digests import ObjectDigest
from storage.objects.listing import _entry
from storage.objects.object_store import ObjectStore
from storage.objects.retry import PAUSES_SECONDS, retried
from storage.objects.sealed_json import seal, unseal
from storage.store import Store
from tests.storage.steps import SteppedObjectStore
from tests.storage.synthetic import (
    data_key,
    fill,
    make_identity,
    make_samples,
    planned,
    tree_digests,
)


def make_old(store: Store, *, days: float = 3) -> None:
    """Let all files be as old as after a holiday."""
    then = time.time() - days * 86400
    for path in Path(store.root.root).rglob("*"):
        os.utime(path, (then, then))


def collect_by_default(store: Store) -> None:
    collect(store, find_garbage(store, keep=snapshots_to_keep(store)))


def test_data_whose_record_was_lost_stays(filled: Store) -> None:
    """A backup of the records, or of one of them, still helps."""
    root = Path(filled.root.root)
    before = tree_digests(filled)
    records = {path: path.read_bytes() for path in (root / "commits").iterdir()}
    for lost in (list(records)[:1], list(records)):
        for path in lost:
            path.unlink()
        make_old(filled)
        assert not find_garbage(filled, keep=snapshots_to_keep(filled))
        collect_by_default(filled)
        for path in lost:
            path.write_bytes(records[path])
        assert tree_digests(filled) == before


def test_leftovers_go_before_there_is_a_snapshot_and_shards_do_not(store: Store) -> None:
    """The first generation may be killed often; nothing else would give its space back."""
    samples = make_samples(6)
    plan = store.plan(planned(samples), shard_tokens=60)
    by_id = {sample.sample_id: sample for sample in samples}
    first, second, *_ = plan.shards
    store.write_shard(first, [by_id[i] for i in first.sample_ids])
    whole = tree_digests(store)
    left = [
        f"shards/{first.shard_id}/0123456789abcdef.zarr.zip",
        f"shards/{second.shard_id}/fedcba9876543210.zarr.zip",
        f"commits/{second.shard_id}.json.0a1b2c3d.tmp",
        "store.json.0a1b2c3d.tmp",
    ]
    for key in left:
        store.root.write(key, b"half")
    assert not find_garbage(store, keep=())
    make_old(store)
    found = find_garbage(store, keep=())
    assert (found.leftovers, found.shard_ids, found.plan_ids) == (tuple(sorted(left)), (), ())
    collect(store, found)
    assert tree_digests(store) == whole

    store.revoke(first.shard_id)  # now nothing is committed: perhaps all records were lost
    make_old(store)
    assert data_key_of(store, first.shard_id) not in find_garbage(store, keep=()).leftovers


def data_key_of(store: Store, shard_id: str) -> str:
    (key,) = store.root.sizes(f"shards/{shard_id}")
    return f"shards/{shard_id}/{key}"


def test_a_plan_is_given_up_only_when_it_is_old(filled: Store) -> None:
    latest = filled.snapshot().snapshot_id
    make_old(filled)
    plan = filled.plan(planned(make_samples(4, seed=8)), shard_tokens=60)

    def given_up() -> tuple[str, ...]:
        return find_garbage(filled, keep=[latest], keep_unfinished=False).plan_ids

    assert given_up() == ()
    make_old(filled)
    assert given_up() == (plan.plan_id,)


def test_a_plan_of_which_all_is_committed_stays_planned(filled: Store) -> None:
    more = make_samples(4, seed=8)
    fill(filled, more, shard_tokens=60)  # finished, and not published
    latest = filled.snapshot().snapshot_id
    plans = {plan.plan_id for plan in filled.plans.all()}
    found = find_garbage(filled, keep=[latest], keep_unfinished=False)
    assert not found.shard_ids, "they are young"
    make_old(filled)
    found = find_garbage(filled, keep=[latest], keep_unfinished=False)
    collect(filled, replace(found, shard_ids=()))
    assert {plan.plan_id for plan in filled.plans.all()} == plans


def test_a_snapshot_that_was_damaged_a_moment_ago_stops_no_collection(filled: Store) -> None:
    old = filled.snapshot().snapshot_id
    latest = filled.publish([sample.sample_id for sample in make_samples(12)[:3]]).snapshot_id
    filled.root.write(f"snapshots/{old}.parquet", b"PAR1")
    assert list(snapshots_to_keep(filled)) == [latest]
    collect_by_default(filled)
    assert filled.snapshot_ids() == [latest]


def test_what_is_not_ours_is_neither_read_nor_collected(filled: Store) -> None:
    """`commits/...json` would be shard `..`: all of the store lies below its folder."""
    root = Path(filled.root.root)
    strange = [root / "commits" / "...json", root / "shards" / "notes.txt", root / "commits" / "x"]
    for path in strange:
        path.write_bytes(b"{}")
    ids = filled.shard_ids()
    assert all(len(name) == 32 for name in ids)
    make_old(filled)
    collect_by_default(filled)
    assert all(path.exists() for path in strange)
    assert filled.shard_ids() == ids
    assert verify_store(filled, deep=True) == []


ELSEWHERE = ["../../store.json", "/etc/passwd", "a/../../b.zarr.zip", "./x.zarr.zip", "a//b", ""]


@pytest.mark.parametrize("key", ELSEWHERE)
def test_a_record_leads_nowhere_else(filled: Store, key: str) -> None:
    _spoil(filled, lambda found: {key: next(iter(found.values()))})


@pytest.mark.parametrize(
    "objects",
    [
        {},
        [],
        "objects",
        {"0123456789abcdef.zarr.zip": [1.5, "0" * 32]},
        {"0123456789abcdef.zarr.zip": ["12", "0" * 32]},
        {"0123456789abcdef.zarr.zip": [-1, "0" * 32]},
        {"0123456789abcdef.zarr.zip": [2**70, "0" * 32]},
        {"0123456789abcdef.zarr.zip": [1, "digest"]},
        {"zarr.json": [1, "0" * 32]},
        {"a.zarr.zip": [1, "0" * 32], "b.zarr.zip": [1, "0" * 32]},
    ],
    ids=str,
)
def test_a_garbled_record_is_a_finding(filled: Store, objects: object) -> None:
    _spoil(filled, lambda _found: objects)


def _spoil(store: Store, change) -> None:  # noqa: ANN001
    shard_id = store.shard_ids()[0]
    key = f"commits/{shard_id}.json"
    document = unseal(store.root.read(key), what=key)
    store.root.write(key, seal({**document, "objects": change(document["objects"])}))
    assert [f.object_key for f in verify_store(store, deep=False)] == [key]
    with pytest.raises(CorruptError, match=f"{shard_id}.*eyas repair"):
        store.commits()
    with pytest.raises(CorruptError, match=f"{shard_id}.*eyas repair"):
        store.reader(store.snapshot()).fetch(0)


def test_a_store_that_may_only_be_read_serves_whoever_needs_nothing(filled: Store) -> None:
    """Whatever version wrote it: version 2 stands in names, latest and snapshots, too."""
    samples = [sample.sample_id for sample in make_samples(12)]
    filled.publish(samples, name="facts-train", made_from="x")
    for key in filled.root.sizes("snapshots"):
        if key.endswith(".json"):
            path = f"snapshots/{key}"
            document = unseal(filled.root.read(path), what=path)
            filled.root.write(path, seal({**document, "format_version": 2}))
    before = {path: path.stat().st_mtime_ns for path in Path(filled.root.root).rglob("*")}
    again = Store.open(filled.root.url).publish(samples, name="facts-train", made_from="x")
    assert again.snapshot_id == filled.snapshot().snapshot_id
    assert {path: path.stat().st_mtime_ns for path in Path(filled.root.root).rglob("*")} == before


def test_a_passing_fault_of_a_disk_ends_no_verification(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        retried.__kwdefaults__ or {}, "pauses_seconds", [0.001] * len(PAUSES_SECONDS)
    )
    pieces, faults = ObjectStore.pieces, 3

    def stale(self: ObjectStore, key: str, *, num_bytes: int):  # noqa: ANN202
        nonlocal faults
        if faults:
            faults -= 1
            raise TransientError(f"{key}: stale file handle")
        yield from pieces(self, key, num_bytes=num_bytes)

    with mock.patch.object(ObjectStore, "pieces", stale):
        assert verify_store(filled, deep=True) == []


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOTTY, 524, errno.EACCES])
def test_a_disk_without_links_holds_a_store(tmp_path: Path, number: int) -> None:
    def no_links(self: Path, _target: Path) -> None:
        raise OSError(number, os.strerror(number), str(self))

    with mock.patch.object(Path, "hardlink_to", no_links):
        store = Store.create(str(tmp_path / "s"), make_identity())
        fill(store, make_samples(3), shard_tokens=60)
    assert verify_store(store, deep=True) == []
    assert not [key for key in store.root.sizes("") if key.endswith(".tmp")]


def test_data_that_is_collected_before_it_is_named_is_an_error(store: Store) -> None:
    samples = make_samples(2)
    (shard,) = store.plan(planned(samples), shard_tokens=10**6).shards

    def step(name: str):  # noqa: ANN202
        if name.startswith("name commits/"):
            store.root.delete_all(f"shards/{shard.shard_id}")
        return mock.MagicMock()

    stepped = Store(SteppedObjectStore.over(store.root, step), store.identity)
    with pytest.raises(TransientError, match=r"is a garbage collection \(gc\) running"):
        stepped.write_shard(shard, samples)
    store.write_shard(shard, samples)
    assert verify_store(store, deep=True) == []


def test_what_nobody_says_the_age_of_is_young() -> None:
    assert _entry({"size": 3}).modified == float("inf")
    assert _entry({"size": 3, "mtime": 5}).modified == 5.0


@pytest.mark.s3
@pytest.mark.parametrize("left", [0, 4095, 4096, 9000])
def test_a_large_object_that_was_cut_is_a_finding(
    s3_root: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a server refuses the ranges behind its end."""
    store = Store.create(s3_root, make_identity())
    samples = make_samples(2)
    fill(store, samples, shard_tokens=10**6)
    snapshot = store.publish([sample.sample_id for sample in samples])
    monkeypatch.setattr("storage.objects.object_store.RANGE_BYTES", 4096)
    key = data_key(store, snapshot.shard_ids[0])
    store.root.write(key, store.root.read(key)[:left])
    (finding,) = verify_store(store, deep=True)
    assert f"has {ObjectDigest.of(store.root.read(key))}" in finding.problem
    with pytest.raises(CorruptError, match="eyas repair"):
        store.reader(snapshot).fetch(0)
