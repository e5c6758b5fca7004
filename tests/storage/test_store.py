"""A store keeps what it was given, only what it was given, and nothing else."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.errors import ConfigError, MismatchError, SampleRefusedError
from storage.maintenance.verify import verify_store
from storage.records.identity import StoreIdentity
from storage.records.plan import PlannedShard
from storage.samples import StoredSample, last_needed
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, planned, tree_digests


def test_create_opens_an_equal_store_and_refuses_another(tmp_path: Path) -> None:
    root = str(tmp_path / "s")
    Store.create(root, make_identity())
    assert Store.create(root, make_identity()).identity == Store.open(root).identity
    with pytest.raises(MismatchError, match="hidden_size: found 64, expected 32"):
        Store.create(root, make_identity(hidden_size=32))


def test_open_refuses_a_path_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no store at"):
        Store.open(str(tmp_path))


def test_round_trip_is_exact(filled: Store, samples: list[StoredSample]) -> None:
    snapshot = filled.snapshot()
    reader = filled.reader(snapshot)
    by_id = {sample.sample_id: sample for sample in samples}
    assert len(reader) == len(samples)
    assert (np.diff(reader.groups) >= 0).all()
    for index in range(len(reader)):
        found = reader.fetch(index)
        expected = by_id.pop(found.sample_id)
        assert reader.lengths[index] == len(expected)
        for name in ("input_ids", "loss_mask", "aux_hidden_states", "target_logsumexp"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype
        present = last_needed(expected.loss_mask)
        np.testing.assert_array_equal(found.last_present, present)
        np.testing.assert_array_equal(
            found.last_hidden_state, np.where(present[:, None], expected.last_hidden_state, 0)
        )


def test_writing_again_does_nothing(filled: Store, samples: list[StoredSample]) -> None:
    before = tree_digests(filled)
    record = next(iter(filled.commits().values()))
    shard = PlannedShard(
        shard_id=record.shard_id, sample_ids=record.sample_ids, num_tokens=record.num_tokens
    )
    assert filled.write_shard(shard, iter(())) == record
    fill(filled, samples)
    assert tree_digests(filled) == before


def test_order_of_arrival_does_not_matter(tmp_path: Path, samples: list[StoredSample]) -> None:
    digests = []
    for name, order in (("a", 1), ("b", -1)):
        store = Store.create(str(tmp_path / name), make_identity())
        plan = store.plan(planned(samples), shard_tokens=10**6)
        store.write_shard(plan.shards[0], samples[::order])
        digests.append(tree_digests(store))
    assert digests[0] == digests[1]


def test_refused_sample_leaves_nothing(store: Store, samples: list[StoredSample]) -> None:
    plan = store.plan(planned(samples), shard_tokens=10**6)
    sick = samples[3].aux_hidden_states.copy()
    sick[1, 1] = 0
    damaged = [*samples[:3], replace(samples[3], aux_hidden_states=sick), *samples[4:]]
    with pytest.raises(SampleRefusedError, match=samples[3].sample_id):
        store.write_shard(plan.shards[0], damaged)
    with pytest.raises(SampleRefusedError, match="1 missing"):
        store.write_shard(plan.shards[0], samples[1:])
    assert not store.commits()
    assert not [key for key in tree_digests(store) if key.startswith("shards/")]


def test_increment_computes_only_what_is_new(filled: Store, samples: list[StoredSample]) -> None:
    more = [*samples, *make_samples(2, seed=9)]
    assert filled.plan(planned(samples[:5]), shard_tokens=100).shards == ()
    plan = filled.plan(planned(more), shard_tokens=1000)
    assert [s for shard in plan.shards for s in shard.sample_ids] == [
        sample.sample_id for sample in more[-2:]
    ]


def test_unfinished_plan_is_resumed_as_persisted(store: Store, samples: list[StoredSample]) -> None:
    plan = store.plan(planned(samples), shard_tokens=100)
    assert [found for found, _ in store.plans.unfinished()] == [plan]
    by_id = {sample.sample_id: sample for sample in samples}
    store.write_shard(plan.shards[1], [by_id[i] for i in plan.shards[1].sample_ids])
    again = store.plan(planned(samples), shard_tokens=77)  # other settings, same work left
    assert again == plan
    assert store.plans.missing(again) == (plan.shards[0], *plan.shards[2:])
    fill(store, samples)
    assert store.plans.unfinished() == []


def test_two_identities_never_share_a_record(
    filled: Store, tmp_path: Path, identity: StoreIdentity
) -> None:
    other = Store.create(str(tmp_path / "other"), replace(identity, target_fingerprint="0" * 64))
    source = Path(filled.root.root) / "commits"
    target = Path(other.root.root) / "commits"
    target.mkdir()
    for record in source.iterdir():
        (target / record.name).write_bytes(record.read_bytes())
    findings = verify_store(other, deep=False)
    assert len(findings) == len(filled.commits())
    assert all("belongs to a store with identity" in finding.problem for finding in findings)


def test_publish_refuses_what_is_not_committed(filled: Store, samples: list[StoredSample]) -> None:
    with pytest.raises(ConfigError, match="1 of 2 samples are in no committed shard, first 0000"):
        filled.publish([samples[0].sample_id, "0" * 32])
    with pytest.raises(ConfigError, match="at least one sample"):
        filled.publish([])


def test_snapshot_is_its_rows(filled: Store, samples: list[StoredSample]) -> None:
    ids = [sample.sample_id for sample in samples]
    latest = filled.snapshot()
    assert filled.publish(ids[::-1]).snapshot_id == latest.snapshot_id
    part = filled.publish(ids[:4])
    assert part.snapshot_id != latest.snapshot_id
    assert filled.snapshot().snapshot_id == part.snapshot_id
    assert filled.snapshot(latest.snapshot_id).num_samples == len(ids)
    with pytest.raises(ConfigError, match="has no snapshot feed"):
        filled.snapshot("feed")


def test_what_is_published_already_is_not_written_again(
    filled: Store, samples: list[StoredSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that whoever needs nothing may work on a read-only store."""
    ids = [sample.sample_id for sample in samples]
    first = filled.publish(ids, name="facts-train", made_from="tokens")
    filled.refs.hold("run", first.snapshot_id)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("storage.objects.local_files.new_file", refuse)
    again = filled.publish(ids, name="facts-train", made_from="tokens")
    assert again.snapshot_id == first.snapshot_id
    filled.refs.hold("run", first.snapshot_id)
    with pytest.raises(ConfigError, match=r"cannot use .*Read-only file system"):
        filled.publish(ids[:1])
