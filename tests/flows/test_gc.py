"""Which snapshots stay, what goes with the others, and that nothing goes unasked."""

from pathlib import Path

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.gc import gc_flow
from flows.reports.inspection import inspect_store
from storage.errors import ConfigError, CorruptError
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.storage.synthetic import (
    committed_samples,
    fill,
    make_identity,
    make_samples,
    planned,
    tree_digests,
)

SAMPLES = make_samples(30, seed=3)
IDS = [sample.sample_id for sample in SAMPLES]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store below the home of target `tiny` and data set `facts`, every sample committed."""
    made = Store.create(str(tmp_path / "stores" / "tiny-facts"), make_identity())
    fill(made, SAMPLES)
    return made


def publish(store: Store, first: int, stop: int) -> str:
    """Publish the samples from `first` to `stop` and return the snapshot's id."""
    return store.publish(IDS[first:stop]).snapshot_id


def test_the_held_out_split_stays_and_earlier_versions_go(store: Store) -> None:
    publish(store, 20, 24)  # held out, while there was less data
    publish(store, 0, 12)
    held_out = publish(store, 20, 26)
    train = publish(store, 0, 18)
    assert list(snapshots_to_keep(store, older_than_hours=0)) == [train, held_out]
    garbage = find_garbage(
        store, keep=snapshots_to_keep(store, older_than_hours=0), older_than_hours=0
    )
    assert len(garbage.snapshot_ids) == 2
    collect(store, garbage)
    assert verify_store(store, deep=True) == []
    assert committed_samples(store) >= {*IDS[:18], *IDS[20:26]}
    assert not find_garbage(
        store, keep=snapshots_to_keep(store, older_than_hours=0), older_than_hours=0
    )


def test_a_few_samples_in_both_splits_do_not_cost_the_held_out_one(store: Store) -> None:
    held_out = publish(store, 16, 22)  # cut to one length, two conversations can become one sample
    train = publish(store, 0, 18)
    assert list(snapshots_to_keep(store, older_than_hours=0)) == [train, held_out]


def test_a_train_split_that_changed_in_part_is_an_earlier_version(store: Store) -> None:
    publish(store, 0, 15)
    train = publish(store, 5, 20)
    assert list(snapshots_to_keep(store, older_than_hours=0)) == [train]


def test_other_data_in_the_same_store_stays(store: Store) -> None:
    other = publish(store, 0, 10)
    train = publish(store, 10, 30)
    assert list(snapshots_to_keep(store, older_than_hours=0)) == [train, other]


def test_what_has_a_name_or_is_held_by_a_run_stays(store: Store) -> None:
    """Two data sets in one store, each with a newer version; a run that began with an older one."""
    first = store.publish(IDS[:10], name="facts-train").snapshot_id
    begun = store.publish(IDS[:12], name="facts-train").snapshot_id
    store.refs.hold("tiny-facts-main", begun)
    facts = store.publish(IDS[:15], name="facts-train").snapshot_id
    old = store.publish(IDS[10:22], name="chat-train").snapshot_id
    chat = store.publish(IDS[10:26], name="chat-train").snapshot_id
    assert store.refs.names() == {"facts-train": facts, "chat-train": chat}
    kept = snapshots_to_keep(store, older_than_hours=0)
    assert kept == {
        chat: "the latest, chat-train",
        facts: "facts-train",
        begun: "held by run tiny-facts-main",
    }
    assert set(find_garbage(store, keep=kept, older_than_hours=0).snapshot_ids) == {first, old}
    store.refs.release("tiny-facts-main", begun)
    assert set(snapshots_to_keep(store, older_than_hours=0)) == {chat, facts}

    only = snapshots_to_keep(store, named=[begun], older_than_hours=0)
    collect(store, find_garbage(store, keep=only, older_than_hours=0))
    assert store.refs.names() == {"chat-train": chat}, "no name of what is not there"
    assert verify_store(store, deep=True) == []


def test_a_damaged_name_is_found_and_nothing_is_garbage_meanwhile(store: Store) -> None:
    train = store.publish(IDS, name="facts-train").snapshot_id
    key = "snapshots/refs/facts-train.json"
    sound = store.root.read(key)
    store.root.write(key, sound.replace(b"2", b"3", 1))
    assert [finding.object_key for finding in verify_store(store, deep=False)] == [key]
    with pytest.raises(CorruptError, match=r"facts-train\.json.*eyas repair"):
        snapshots_to_keep(store, older_than_hours=0)
    assert inspect_store(store.root.root).damaged == ("the name of a snapshot",)
    store.refs.set("facts-train", "f" * 32)
    assert "which does not exist" in verify_store(store, deep=False)[0].problem
    assert list(snapshots_to_keep(store, older_than_hours=0)) == [train]


def test_a_damaged_snapshot_that_only_a_run_holds_is_dropped(store: Store) -> None:
    held = publish(store, 0, 20)
    store.refs.hold("tiny-facts-main", held)
    train = publish(store, 0, 30)
    store.root.write(f"snapshots/{held}.parquet", b"PAR1")
    collect(
        store,
        find_garbage(store, keep=snapshots_to_keep(store, older_than_hours=0), older_than_hours=0),
    )
    assert store.snapshot_ids() == [train]
    assert store.refs.held() == []


def test_named_snapshots_and_the_latest_stay_and_no_other(store: Store) -> None:
    publish(store, 0, 10)
    named = publish(store, 10, 20)
    train = publish(store, 20, 30)
    kept = snapshots_to_keep(store, named=[named], older_than_hours=0)
    assert list(kept) == [train, named]
    assert find_garbage(store, keep=kept, older_than_hours=0).num_bytes > 0
    with pytest.raises(ConfigError, match=f"no snapshot feed; it has: .*{train}"):
        find_garbage(
            store,
            keep=snapshots_to_keep(store, named=["feed"], older_than_hours=0),
            older_than_hours=0,
        )


def test_an_unfinished_plan_stays_until_it_is_given_up(store: Store) -> None:
    train = publish(store, 0, 30)
    more = make_samples(9, seed=8)
    plan = store.plan(planned(more), shard_tokens=60)
    by_id = {sample.sample_id: sample for sample in more}
    begun = plan.shards[0]
    store.write_shard(begun, [by_id[sample_id] for sample_id in begun.sample_ids])
    assert not find_garbage(store, keep=[train], older_than_hours=0)
    (unfinished,) = inspect_store(store.root.root).unfinished
    assert (unfinished.num_missing, unfinished.num_shards) == (
        len(plan.shards) - 1,
        len(plan.shards),
    )

    garbage = find_garbage(store, keep=[train], keep_unfinished=False, older_than_hours=0)
    assert garbage.plan_ids == (plan.plan_id,)
    assert garbage.shard_ids == (begun.shard_id,)
    collect(store, garbage)
    assert inspect_store(store.root.root).unfinished == ()
    assert store.plans.unfinished() == []


@pytest.mark.server
@pytest.mark.usefixtures("prefect_server")
def test_the_flow_deletes_only_when_told_so(
    store: Store,
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(store, 0, 30)
    publish(store, 0, 20)
    before = tree_digests(store)
    found = gc_flow(target=target, dataset=dataset, home=str(tmp_path), older_than_hours=0)
    assert found.num_bytes > 0
    assert tree_digests(store) == before
    assert "to delete" in capsys.readouterr().out
    gc_flow(target=target, dataset=dataset, home=str(tmp_path), older_than_hours=0, delete=True)
    assert store.shard_ids() == sorted(set(store.shard_ids()) - set(found.shard_ids))
    assert not set(tree_digests(store)) & {f"commits/{shard}.json" for shard in found.shard_ids}
    assert not gc_flow(target=target, dataset=dataset, home=str(tmp_path), older_than_hours=0)
