"""Many records in a few files: the store says the same before, between and after."""

import pickle
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import CorruptError, MovedError, ShardMissingError, TransientError
from storage.maintenance.gc import collect, find_garbage
from storage.maintenance.repair import damaged_shards
from storage.maintenance.verify import verify_store
from storage.objects.sealed_json import seal, unseal
from storage.records.commits import Commits
from storage.records.keys import manifest_copies
from storage.records.manifest import manifest_ids
from storage.records.plan import PlannedShard
from storage.records.sample_rows import Wanted, ids_of, names_of
from storage.records.snapshot import Snapshot
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.steps import SteppedObjectStore
from tests.storage.synthetic import (
    data_key,
    drop_leftovers,
    fill,
    make_identity,
    make_samples,
    planned,
)

SAMPLES = make_samples(24, tokens=(5, 20))
IDS = [sample.sample_id for sample in SAMPLES]


@pytest.fixture(autouse=True)
def compact_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put 4 records into a manifest, and let the next look remove them."""
    monkeypatch.setattr("storage.records.compaction.COMPACT_FROM", 4)
    monkeypatch.setattr("storage.records.compaction.SETTLE_SECONDS", -60.0)


@pytest.fixture
def store(root: str) -> Store:
    """A store of many shards, in each place, all of them published and single."""
    made = Store.create(root, make_identity())
    fill(made, SAMPLES, shard_tokens=30)
    assert len(made.shard_ids()) > 8
    return made


def single(store: Store) -> set[str]:
    return {key for key in store.root.sizes("commits") if key.endswith(".json")}


def read_all(store: Store) -> dict[str, StoredSample]:
    reader = store.reader(store.snapshot())
    return {sample.sample_id: sample for sample in map(reader.fetch, range(len(reader)))}


def test_a_store_says_the_same_before_between_and_after(store: Store) -> None:
    records, ids, totals = dict(store.commits()), store.shard_ids(), store.commits().totals
    samples = Snapshot.of(IDS, store.commits())
    store.publish(IDS)
    assert len(manifest_ids(store.root)) == 1
    assert len(single(store)) == len(ids), "they stay beside the manifest for a while"
    between = Store.open(store.root.url)
    assert dict(between.commits()) == records

    store.compact()
    assert single(store) == set()
    after = Store.open(store.root.url)
    assert after.shard_ids() == ids
    found = after.commits()
    assert dict(found) == records
    assert (len(found), found.totals) == (len(records), totals)
    assert set(found) == set(records)
    assert ids[0] in found
    assert "f" * 32 not in found
    assert after.commit(ids[1]) == records[ids[1]]
    assert after.some_commits(ids[:3]) == {name: records[name] for name in ids[:3]}
    assert after.held([*IDS[:5], "f" * 32]) == set(IDS[:5])
    again = Snapshot.of(IDS, found)
    assert again.snapshot_id == samples.snapshot_id
    assert again.to_parquet() == samples.to_parquet()
    after.require_present(again)
    assert verify_store(after, deep=True) == []
    assert set(read_all(after)) == set(IDS)
    assert after.plan(planned(SAMPLES), shard_tokens=30).shards == ()
    more = [*SAMPLES, *make_samples(2, seed=9)]
    (fresh,) = after.plan(planned(more), shard_tokens=10**6).shards
    assert set(fresh.sample_ids) == {sample.sample_id for sample in more[-2:]}
    with pytest.raises(ShardMissingError, match=r"ffff.*eyas repair"):
        after.commit("f" * 32)


def test_what_is_revoked_is_missing_and_can_be_made_again(store: Store) -> None:
    store.publish(IDS)
    store.compact()
    other = Store.open(store.root.url)
    other.commits()  # has read the manifest before
    name = store.shard_ids()[2]
    record = store.commit(name)
    store.revoke(name)
    for opened in (store, other, Store.open(store.root.url)):
        assert name not in opened.shard_ids()
        assert name not in opened.commits()
        with pytest.raises(ShardMissingError, match=name):
            opened.commit(name)
        with pytest.raises(ShardMissingError, match=name):
            read_all(opened)
    assert {f.shard_id for f in verify_store(store, deep=True)} == {name}
    (shard,) = damaged_shards(store, verify_store(store, deep=True))
    by_id = {sample.sample_id: sample for sample in SAMPLES}
    made = other.write_shard(shard, [by_id[i] for i in shard.sample_ids])
    assert made.objects != record.objects
    assert Store.open(store.root.url).commit(name) == made
    assert set(read_all(store)) == set(IDS)
    fill(store, [*SAMPLES, *make_samples(9, seed=3)], shard_tokens=30)
    store.compact()
    store.compact()
    assert single(store) == set()
    assert store.commit(name) == made, "the row that was revoked does not come back"
    assert verify_store(store, deep=True) == []


def test_a_record_counts_more_than_a_row(store: Store) -> None:
    """It is newer: the data of the row was lost, and the shard was written again."""
    store.publish(IDS)
    store.compact()
    name = store.shard_ids()[0]
    old = store.commit(name)
    store.root.delete(data_key(store, name))
    shard = PlannedShard(shard_id=name, sample_ids=old.sample_ids, num_tokens=old.num_tokens)
    by_id = {sample.sample_id: sample for sample in SAMPLES}
    made = store.write_shard(shard, [by_id[i] for i in shard.sample_ids])
    assert Store.open(store.root.url).commits()[name] == made
    fill(store, [*SAMPLES, *make_samples(9, seed=3)], shard_tokens=30)
    for _ in range(2):
        store.compact()
        assert Store.open(store.root.url).commit(name) == made
        assert Store.open(store.root.url).commits()[name] == made
    assert single(store) == set()
    assert verify_store(store, deep=True) == []


def test_small_manifests_are_merged_into_larger_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So there are few of them however often is published, and each record moves few times."""
    monkeypatch.setattr("storage.records.compaction.MOST_SHARDS", 40)
    samples = list(SAMPLES)
    for number in range(6):
        store.compact()
        samples += make_samples(12, seed=100 + number, tokens=(5, 20))
        fill(store, samples, shard_tokens=30)
    store.compact()
    store.compact()
    manifests = store.log.manifests()
    assert len(store.shard_ids()) > 40
    assert 2 <= len(manifests) <= 4
    assert max(len(one.shard_ids) for one in manifests) <= 40
    assert sum(len(one.shard_ids) for one in manifests) == len(store.shard_ids())
    assert verify_store(store, deep=True) == []
    kept = store.publish(IDS).snapshot_id
    drop = find_garbage(store, keep=[kept], keep_unfinished=False, older_than_hours=0)
    collect(store, drop)
    assert store.held([sample.sample_id for sample in samples]) >= set(IDS)
    assert set(store.shard_ids()) == set(store.snapshot().shard_ids)


def test_an_old_plan_goes_when_manifest_and_snapshot_have_its_shards(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(store.plans.all()) == 1
    store.publish(IDS[:-1])
    assert len(store.plans.all()) == 1, "a shard of it may be in no snapshot yet"
    store.publish(IDS)
    assert len(store.plans.all()) == 1, "it is young: somebody may be at work on it"
    monkeypatch.setattr("storage.records.plans.MIN_AGE_SECONDS", -60.0)
    store.publish(IDS[:3])
    assert len(store.plans.all()) == 1
    (store_snapshot,) = [s for s in store.snapshot_ids() if store.snapshot(s).num_samples == 24]
    store.root.delete(f"snapshots/{store_snapshot}.parquet")
    store.publish(IDS)
    assert store.plans.all() == []
    store.root.write(f"commits/{store.shard_ids()[0]}.json", b"{}")
    (shard,) = damaged_shards(store, verify_store(store, deep=False))
    assert shard.shard_id == store.shard_ids()[0], "the manifest says what it held"


def test_either_copy_will_do_and_a_damaged_one_is_found_and_mended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(IDS)
    store.compact()
    records = dict(store.commits())
    (manifest_id,) = manifest_ids(store.root)
    for kind in ("shards", "samples"):
        for key in manifest_copies(manifest_id, kind):
            whole = store.root.read(key)
            for damage in (
                whole[:-1],
                whole[: len(whole) // 2] + b"x" + whole[len(whole) // 2 + 1 :],
            ):
                store.root.write(key, damage)
                opened = Store.open(store.root.url)
                assert dict(opened.commits()) == records
                assert [f.object_key for f in verify_store(opened, deep=False)] == [key]
                opened.mend_manifests()
                assert store.root.read(key) == whole
            store.root.delete(key)
            opened = Store.open(store.root.url)
            assert dict(opened.commits()) == records
            assert verify_store(opened, deep=True) == [], "as while it is written"
            with monkeypatch.context() as later:
                later.setattr("storage.maintenance.verify.WRITING_SECONDS", -60.0)
                assert [f.object_key for f in verify_store(opened, deep=True)] == [key]
            opened.mend_manifests()
            assert verify_store(opened, deep=True) == []


def test_lost_samples_of_a_manifest_are_an_error_that_names_it(store: Store) -> None:
    store.publish(IDS)
    store.compact()
    (manifest_id,) = manifest_ids(store.root)
    for key in manifest_copies(manifest_id, "samples"):
        store.root.delete(key)
    opened = Store.open(store.root.url)
    assert len(opened.shard_ids()) > 8
    assert set(read_all(opened)) == set(IDS), "reading needs no samples"
    for operation in (
        lambda: opened.held(IDS),
        lambda: opened.publish(IDS[:2]),
        lambda: opened.commit(opened.shard_ids()[0]),
        opened.mend_manifests,
    ):
        with pytest.raises(CorruptError, match=f"{manifest_id}.*hidden-states"):
            operation()


def test_two_that_compact_the_same_remove_nothing_that_only_they_have(store: Store) -> None:
    """One has read the records, the other puts them together meanwhile: neither loses them."""
    records = dict(store.commits())

    def step(name: str) -> AbstractContextManager[object]:
        if name.startswith(("write manifests/", "name manifests/")) and not manifest_ids(
            store.root
        ):
            Store.open(store.root.url).compact()
        return nullcontext()

    Store(SteppedObjectStore.over(store.root, step), store.identity).compact()
    for name in records:
        store.root.delete(f"commits/{name}.json")  # as a third does when they have settled
    assert dict(Store.open(store.root.url).commits()) == records


def test_a_newer_record_counts_though_a_kill_ended_its_compaction(store: Store) -> None:
    """At each of its steps; the row of before, whose data is lost, never comes back."""

    class Killed(BaseException):
        pass

    store.compact()
    store.compact()
    assert single(store) == set()
    lost = store.shard_ids()[:4]
    by_id = {sample.sample_id: sample for sample in SAMPLES}
    newer = {}
    for name in lost:
        old = store.commit(name)
        store.root.delete(data_key(store, name))
        shard = PlannedShard(shard_id=name, sample_ids=old.sample_ids, num_tokens=old.num_tokens)
        newer[name] = store.write_shard(shard, [by_id[i] for i in shard.sample_ids])
    for stop_at in range(40):
        steps = 0

        @contextmanager
        def step(name: str, stop_at: int = stop_at) -> Iterator[None]:
            nonlocal steps
            if name.split(maxsplit=1)[0] in {"name", "write", "delete", "create"}:
                if steps == stop_at:
                    raise Killed
                steps += 1
            yield

        with suppress(Killed):
            Store(SteppedObjectStore.over(store.root, step), store.identity).compact()
        opened = Store.open(store.root.url)
        assert {name: opened.commit(name) for name in lost} == newer
        assert {name: opened.commits()[name] for name in lost} == newer
    for _ in range(3):
        store.compact()
    assert single(store) == set()
    assert {name: Store.open(store.root.url).commit(name) for name in lost} == newer
    assert verify_store(store, deep=True) == []


def test_what_was_read_before_serves_while_others_put_together(store: Store) -> None:
    """Two snapshots from one look, as `hidden-states` publishes them."""
    store.compact()
    store.compact()
    fill(store, [*SAMPLES, *make_samples(30, seed=3, tokens=(5, 20))], shard_tokens=30)
    commits = store.commits()
    reader = store.reader(Snapshot.of(IDS, commits))
    other = Store.open(store.root.url)
    other.commits()
    store.publish(IDS[:5], commits=commits, as_latest=False)
    store.publish(IDS, commits=commits)
    assert len(reader.fetch(0)) > 0
    names = other.shard_ids()
    for _ in range(3):
        Store.open(store.root.url).compact()
    assert {name: other.commit(name).shard_id for name in names} == {n: n for n in names}
    assert set(other.some_commits(names)) == set(names)


def test_what_was_read_long_ago_says_to_look_again(store: Store) -> None:
    """A verification takes hours; meanwhile manifests were put into others."""
    store.compact()
    store.compact()
    commits = store.commits()
    fill(store, [*SAMPLES, *make_samples(60, seed=3, tokens=(5, 20))], shard_tokens=30)
    for _ in range(3):
        store.compact()
    with pytest.raises(TransientError, match="Run the same command again"):
        list(commits.values())
    with pytest.raises(TransientError, match="Run the same command again"):
        commits.held(IDS)
    copy = pickle.loads(pickle.dumps(MovedError("moved")))  # noqa: S301 (as workers send it)
    assert (type(copy), str(copy)) == (MovedError, "moved")


def test_a_reader_of_long_ago_finds_what_was_made_again(store: Store) -> None:
    store.publish(IDS)
    store.compact()
    reader = store.reader(store.snapshot())
    reader.fetch(0)
    name = store.snapshot().shard_ids[-1]
    other = Store.open(store.root.url)
    record = other.commit(name)
    other.revoke(name)
    store.root.delete_all(f"shards/{name}")
    shard = PlannedShard(shard_id=name, sample_ids=record.sample_ids, num_tokens=record.num_tokens)
    by_id = {sample.sample_id: sample for sample in SAMPLES}
    other.write_shard(shard, [by_id[i] for i in shard.sample_ids])
    fill(other, [*SAMPLES, *make_samples(30, seed=3, tokens=(5, 20))], shard_tokens=30)
    for _ in range(3):
        other.compact()
    assert single(store) == set()
    assert reader.fetch(len(reader) - 1).sample_id in record.sample_ids


def test_both_copies_damaged_is_an_error_that_names_the_manifest(store: Store) -> None:
    store.publish(IDS)
    store.compact()
    (manifest_id,) = manifest_ids(store.root)
    for key in manifest_copies(manifest_id, "shards"):
        store.root.write(key, b"PAR1")
    opened = Store.open(store.root.url)
    for operation in (opened.commits, opened.shard_ids, lambda: verify_store(opened, deep=False)):
        with pytest.raises(CorruptError, match=f"{manifest_id}.*hidden-states"):
            operation()


def test_a_row_of_another_store_is_refused(store: Store, tmp_path: Path) -> None:
    store.publish(IDS)
    other = Store.create(str(tmp_path / "other"), make_identity(target_fingerprint="0" * 64))
    for key in store.root.sizes("manifests"):
        other.root.write(f"manifests/{key}", store.root.read(f"manifests/{key}"))
    with pytest.raises(CorruptError, match="belongs to a store with identity"):
        other.commits()


def test_a_store_of_version_2_says_3_before_its_records_move(store: Store) -> None:
    """A release that knows no manifests would take its shards for lost."""
    key = "store.json"
    document = unseal(store.root.read(key), what=key) | {"format_version": 2}
    store.root.write(key, seal(document))
    opened = Store.open(store.root.url)
    opened.publish(IDS)
    assert unseal(store.root.read(key), what=key)["format_version"] == 3
    assert Store.open(store.root.url).identity == store.identity


def test_compacting_stops_nobody(tmp_path: Path) -> None:
    """Others open, read, write and compact at each of its steps; it may be killed there, too."""
    for stop_at in range(60):
        store = Store.create(str(tmp_path / str(stop_at)), make_identity())
        fill(store, SAMPLES[:12], shard_tokens=30)
        store.publish(IDS[:12])  # the first of them: now there are records that can go
        fill(store, SAMPLES, shard_tokens=30)
        records = dict(store.commits())
        if _compact_while_others_work(store, records, stop_at=stop_at):
            return
    pytest.fail("compacting took more steps than expected")


def _compact_while_others_work(store: Store, records: dict, *, stop_at: int) -> bool:
    """Tell whether it ended before the step at which it was to be killed."""
    steps = 0
    lost = min(records)

    class Killed(BaseException):
        pass

    @contextmanager
    def step(name: str) -> Iterator[None]:
        nonlocal steps
        if name.split(maxsplit=1)[0] in {"name", "delete", "create"}:
            opened = Store.open(store.root.url)
            assert dict(opened.commits()) == records
            if steps == stop_at // 2:
                opened.revoke(lost)
                records.pop(lost, None)
                opened.compact()
            if steps == stop_at:
                raise Killed
            steps += 1
        yield

    stepped = Store(SteppedObjectStore.over(store.root, step), store.identity)
    try:
        stepped.compact()
    except Killed:
        ended = False
    else:
        ended = True
    opened = Store.open(store.root.url)
    assert dict(opened.commits()) == records
    opened.compact()
    opened.compact()
    assert dict(Store.open(store.root.url).commits()) == records
    if lost not in records:
        assert lost not in opened.shard_ids()
    return ended


def test_several_compact_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    records = dict(store.commits())
    threads = [
        threading.Thread(target=lambda: Store.open(store.root.url).compact()) for _ in range(4)
    ]
    with monkeypatch.context() as meanwhile:
        # One may not remove what another is still writing: an hour is longer than a compaction.
        meanwhile.setattr("storage.records.compaction.SETTLE_SECONDS", 3600.0)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert single(store), "nothing is removed that is new"
    Store.open(store.root.url).compact()
    assert not single(store)
    assert dict(Store.open(store.root.url).commits()) == records
    store.publish(IDS)
    drop_leftovers(store)
    assert dict(Store.open(store.root.url).commits()) == records


def test_a_log_travels_without_what_it_has_read(store: Store) -> None:
    store.publish(IDS)
    store.commits()
    assert len(pickle.dumps(store.log)) < 1000
    copy = pickle.loads(pickle.dumps(store.log))  # noqa: S301
    assert copy.ids() == store.shard_ids()


@given(
    known=st.lists(st.binary(min_size=16, max_size=16), max_size=40),
    wanted=st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=20),
    prefix=st.sampled_from([b"", b"12345678"]),
)
def test_samples_are_found_as_a_set_finds_them(
    known: list[bytes], wanted: list[bytes], prefix: bytes
) -> None:
    """Also those that begin with the same 8 bytes, and end in zeros."""
    known = [prefix + one[len(prefix) :] for one in [*known, *wanted[::2], bytes(16)]]
    wanted = [prefix + one[len(prefix) :] for one in wanted]
    look = Wanted([one.hex() for one in wanted])
    rows = np.frombuffer(b"".join(known), "S16")
    found = {int(row) for many, _ in look.find(rows) for row in many}
    assert found == {row for row, one in enumerate(known) if one in set(wanted)}
    for many, ats in look.find(rows):
        assert (look.sample_ids[ats] == rows[many]).all()
    assert names_of(ids_of([one.hex() for one in known])) == [one.hex() for one in known]


def test_a_sample_in_several_shards_is_taken_from_the_smallest(store: Store) -> None:
    records = dict(store.commits())
    by_shard = sorted(records)
    twice = records[by_shard[3]].sample_ids[0]
    first = records[by_shard[1]]
    doubled = replace(
        first,
        sample_ids=(twice, *first.sample_ids[1:]),
    )
    commits = Commits({**records, by_shard[1]: doubled})
    snapshot = Snapshot.of([twice], commits)
    assert snapshot.shard_ids == (by_shard[1],)
    assert snapshot.positions.tolist() == [0]
