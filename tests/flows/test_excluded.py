"""A sample whose states are not finite is left out by name; the store goes on without it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from flows.bridge.store_identity import store_identity
from flows.bridge.stored_source import to_stored
from flows.config.store import StoreConfig
from flows.estimate import estimate_flow
from flows.hidden_states import hidden_states
from flows.plan import plan as plan_flow
from flows.repair import repair_flow
from flows.reports.inspection import inspect_store
from flows.reports.run_record import RunRecord
from flows.reports.store_tables import store_rows
from flows.tasks.preflight import wanted_samples
from flows.tasks.prepare import prepare
from flows.tasks.publish import publish
from flows.train import train_flow
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.records.exclusions import Exclusion
from storage.records.plan import Plan, PlannedShard
from storage.store import Store
from tests import tiny
from tests.storage.synthetic import make_identity, make_samples, planned

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

POISON = "§"
"""The first layer makes infinity of it; every weight is finite."""
NUM_CONVERSATIONS = 24


@pytest.fixture(scope="module")
def poisoned_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny target with one token that ruins whatever it is in."""
    folder = tiny.write_target(tmp_path_factory.mktemp("poisoned"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(folder).encode(POISON)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0  # a channel that this token alone uses
        embeddings[ids[-1], 0] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        gate = model.model.layers[0].mlp.gate_proj.weight
        gate[0] = 0
        gate[0, 0] = 3e38
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def poisoned(poisoned_path: Path, target: TargetConfig) -> TargetConfig:
    """The target of these tests."""
    return target.model_copy(update={"model": str(poisoned_path)})


def _dataset(folder: Path, records: Sequence[int], *, held_out: float = 0.3) -> DatasetConfig:
    """Return a data set of which some records hold the token."""
    path = tiny.write_conversations(folder / "facts.json", NUM_CONVERSATIONS)
    conversations = json.loads(path.read_text())
    for record in records:
        conversations[record]["conversations"][0]["value"] += f" {POISON} {record}"
    path.write_text(json.dumps(conversations))
    return DatasetConfig(name="facts", source=str(path), held_out_fraction=held_out, max_length=256)


def _trees(store: Store) -> Sequence[str]:
    return sorted(key for kind in ("commits", "shards") for key in store.root.sizes(kind))


@pytest.mark.parametrize(
    ("shard_tokens", "recompute"),
    [(600, False), (1, True)],
    ids=["among others", "alone in its shard, with recompute"],
)
def test_one_bad_sample_is_left_out_and_named(
    tmp_path: Path, poisoned: TargetConfig, shard_tokens: int, *, recompute: bool
) -> None:
    dataset = _dataset(tmp_path, [5])
    store = StoreConfig(shard_tokens=shard_tokens, shards_per_task=16, recompute=recompute)
    made = hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    assert (made.num_samples, made.num_excluded) == (NUM_CONVERSATIONS - 1, 1)
    assert made.shards_made == made.num_shards
    opened = Store.open(made.store_root)
    (note,) = opened.exclusions.read()
    assert note.reason == "its aux states are not finite"
    assert note.location.startswith("facts.json, record 5"), note.location
    assert verify_store(opened, deep=True) == []
    kept = snapshots_to_keep(opened, older_than_hours=0)
    assert not find_garbage(opened, keep=kept, older_than_hours=0)
    figures = inspect_store(made.store_root)
    assert not figures.unfinished
    assert "facts.json, record 5" in dict(store_rows(figures))["excluded"]

    before = _trees(opened)
    again = hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    assert (again.shards_made, again.snapshot_id) == (0, made.snapshot_id)

    training = TrainingConfig(max_steps=2, batch_tokens=256, draft_vocab_size=128)
    learned = train_flow(
        target=poisoned, dataset=dataset, store=store, training=training, home=str(tmp_path)
    )
    assert (learned.num_steps, learned.source_id) == (2, made.snapshot_id)

    opened.root.delete(f"excluded/{note.sample_id}.json")  # or a kill before it was written
    assert _trees(opened) == before
    anew = hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    assert (anew.shards_made, anew.snapshot_id, anew.num_excluded) == (0, made.snapshot_id, 1)
    assert _trees(opened) == before


def test_all_that_is_held_out_can_be_left_out(tmp_path: Path, poisoned: TargetConfig) -> None:
    every = range(NUM_CONVERSATIONS)
    bad = _held_out(tmp_path, [], fraction=0.2) | _held_out(tmp_path, every, fraction=0.2)
    dataset = _dataset(tmp_path, sorted(bad), held_out=0.2)
    assert set() < _held_out(tmp_path, sorted(bad), fraction=0.2) <= bad
    store = StoreConfig(shard_tokens=600, max_excluded_share=0.9)
    made = hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    assert 0 < made.num_excluded == len(bad) < NUM_CONVERSATIONS * 2 / 3
    training = TrainingConfig(max_steps=2, batch_tokens=256, draft_vocab_size=128)
    learned = train_flow(
        target=poisoned, dataset=dataset, store=store, training=training, home=str(tmp_path)
    )
    assert (learned.num_steps, learned.figures.held_out_step) == (2, 0)
    settings = RunRecord.read(learned.run_path).settings
    assert settings is not None
    assert settings.held_out.num_samples == settings.held_out.num_supervised == 0
    assert settings.train.num_samples + made.num_excluded == NUM_CONVERSATIONS
    with pytest.raises(ConfigError, match=r"excludes all \d+ held-out samples"):
        estimate_flow(
            target=poisoned, dataset=dataset, store=store, training=training, home=str(tmp_path)
        )


def test_nothing_is_left_says_so(tmp_path: Path, poisoned: TargetConfig) -> None:
    dataset = _dataset(tmp_path, range(NUM_CONVERSATIONS))
    store = StoreConfig(shard_tokens=600, max_excluded_share=1)
    with pytest.raises(CorruptError, match=r"no sample to train on: all of 24 are excluded"):
        hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    with pytest.raises(CorruptError, match=r"none of \d+ tried samples has finite states"):
        plan_flow(target=poisoned, dataset=dataset, home=str(tmp_path / "plan"))


def test_costs_are_measured_without_it(tmp_path: Path, poisoned: TargetConfig) -> None:
    dataset = _dataset(tmp_path, [5], held_out=0)
    bill = plan_flow(target=poisoned, dataset=dataset, home=str(tmp_path))
    assert bill.tokens_per_second > 0


def test_candidates_are_compared_without_it(
    tmp_path: Path, poisoned: TargetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = _dataset(tmp_path, [5], held_out=0.4)
    plan_flow(target=poisoned, dataset=dataset, home=str(tmp_path), candidates=True)
    printed = capsys.readouterr().out
    tokens = [TokenFile(path) for path in (tmp_path / "tokens").rglob("*.arrow")]
    (positions,) = re.findall(r"solved on .* ([\d,]+) supervised positions", printed)
    (held_out,) = re.findall(r"measured on .* ([\d,]+) positions", printed)
    used = sum(int(number.replace(",", "")) for number in (positions, held_out))
    every = sum(int(sample.loss_mask[2:].sum()) for file in tokens for sample in file)
    assert 0 < every - used < 200  # those of one conversation


def test_repair_leaves_nothing_out_and_collection_nothing_behind(
    tmp_path: Path, poisoned: TargetConfig, target: TargetConfig
) -> None:
    """States that were finite elsewhere, and are not on this machine."""
    dataset = _dataset(tmp_path, [5])
    config = StoreConfig(shard_tokens=600)
    space, tokens = prepare(poisoned, dataset, str(tmp_path))
    store = Store.create(str(space.store_root), store_identity(poisoned, config, tokens))
    elsewhere = TargetModel.load(target)
    files = [TokenFile(path) for path in (tokens.train_path, tokens.held_out_path)]
    every = {sample.sample_id: sample for file in files for sample in file}
    for shard in store.plan(wanted_samples(tokens), shard_tokens=600).shards:
        states = capture_states(elsewhere, [every[name] for name in shard.sample_ids])
        store.write_shard(shard, map(to_stored, states))
    publish(store, tokens, space, shards_made=0, started=0.0)
    (bad,) = [name for name, sample in every.items() if "record 5 " in sample.location]
    (record,) = [one for one in store.commits().values() if bad in one.sample_ids]
    (key,) = record.objects
    damaged = space.store_root / "shards" / record.shard_id / key
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")

    with pytest.raises(
        CorruptError, match=r"record 5 .*but they were when this shard was computed"
    ):
        repair_flow(target=poisoned, dataset=dataset, store=config, home=str(tmp_path))
    kept = snapshots_to_keep(store, older_than_hours=0)
    collect(store, find_garbage(store, keep=kept, older_than_hours=0))
    assert store.held(every) == every.keys() - {bad}, "the others are made, and not published yet"

    made = hidden_states(target=poisoned, dataset=dataset, store=config, home=str(tmp_path))
    assert (made.shards_made, made.num_samples, made.num_excluded) == (0, len(every) - 1, 1)
    kept = snapshots_to_keep(store, older_than_hours=0)
    collect(store, find_garbage(store, keep=kept, older_than_hours=0))
    assert verify_store(store, deep=True) == []


def test_estimate_does_without_what_is_left_out(tmp_path: Path, poisoned: TargetConfig) -> None:
    bad = min(_held_out(tmp_path, range(NUM_CONVERSATIONS), fraction=0.3))
    dataset = _dataset(tmp_path, [bad])
    store = StoreConfig(shard_tokens=600)
    made = hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    assert made.num_excluded == 1
    training = TrainingConfig(max_steps=2, batch_tokens=256, draft_vocab_size=128)
    train_flow(target=poisoned, dataset=dataset, store=store, training=training, home=str(tmp_path))
    found = estimate_flow(
        target=poisoned, dataset=dataset, store=store, training=training, home=str(tmp_path)
    )
    assert found.estimate.num_samples == len(_held_out(tmp_path, [bad], fraction=0.3)) - 1 > 0


def _held_out(folder: Path, records: Sequence[int], *, fraction: float) -> set[int]:
    """Return which records are held out if some hold the token: the content decides that."""
    dataset = _dataset(folder, records, held_out=fraction)
    out_dir = folder / f"split-{len(records)}"
    build_dataset(dataset, out_dir=out_dir)
    locations = [one.location for one in load_conversations(out_dir, "held_out")]
    return {int(location.split()[2]) for location in locations}


def test_many_bad_samples_stop_the_run_and_are_not_left_out(
    tmp_path: Path, poisoned: TargetConfig
) -> None:
    dataset = _dataset(tmp_path, range(0, NUM_CONVERSATIONS, 3))
    store = StoreConfig(shard_tokens=600, shards_per_task=16)
    with pytest.raises(
        CorruptError, match=r"8 of 24 samples, first sample \w+ \(facts\.json, record \d+.*"
    ) as raised:
        hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    assert "at most 1 may be excluded (store.max_excluded_share 0.01)" in str(raised.value)
    opened = Store.open(str(tmp_path / "stores" / "tiny-facts"))
    assert not opened.exclusions.read()
    assert not opened.snapshot_ids()

    more = store.model_copy(update={"max_excluded_share": 0.4})
    made = hidden_states(target=poisoned, dataset=dataset, store=more, home=str(tmp_path))
    assert (made.num_samples, made.num_excluded) == (16, 8)
    with pytest.raises(CorruptError, match="8 of 24 samples"):  # the limit was lowered again
        hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))


def test_a_damaged_note_is_found_and_its_sample_tried_again(
    tmp_path: Path, poisoned: TargetConfig
) -> None:
    dataset = _dataset(tmp_path, [5])
    store = StoreConfig(shard_tokens=600)
    made = hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    opened = Store.open(made.store_root)
    (sample_id,) = opened.exclusions.sample_ids()
    key = f"excluded/{sample_id}.json"
    opened.root.publish(key, b"{}")
    (finding,) = verify_store(opened, deep=False)
    assert finding.object_key == key
    assert key in dict(store_rows(inspect_store(made.store_root)))["unreadable"]
    repair_flow(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    assert not opened.exclusions.sample_ids()
    hidden_states(target=poisoned, dataset=dataset, store=store, home=str(tmp_path))
    assert opened.exclusions.sample_ids() == {sample_id}
    assert verify_store(opened, deep=False) == []


def test_a_plan_is_at_an_end_when_other_shards_have_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(str(tmp_path), make_identity())
    samples = make_samples(3, seed=1, tokens=(5, 9))
    (whole,) = store.plan(planned(samples), shard_tokens=100).shards
    bad = Exclusion(sample_id=samples[1].sample_id, reason="its last states are not finite")
    assert len(store.plans.unfinished()) == 1
    for sample in samples[::2]:
        (alone,) = Plan.of([PlannedShard.of(planned([sample]))]).shards
        store.write_shard(alone, [sample])
    assert len(store.plans.unfinished()) == 1
    store.exclusions.add(bad)
    assert store.plans.unfinished() == []
    assert list(store.commits().lacks(planned(samples))) == []
    store.root.delete(f"excluded/{bad.sample_id}.json")
    (again,) = store.plan(planned(samples), shard_tokens=100).shards
    assert again.sample_ids == (bad.sample_id,) != whole.sample_ids
    store.write_shard(again, [samples[1]])  # it can be computed by now
    assert store.plans.unfinished() == []
    store.publish([sample.sample_id for sample in samples])
    kept = snapshots_to_keep(store, older_than_hours=0)
    assert not find_garbage(store, keep=kept, older_than_hours=0)

    monkeypatch.setattr("storage.records.compaction.COMPACT_FROM", 1)
    monkeypatch.setattr("storage.records.plans.MIN_AGE_SECONDS", -60.0)
    store.publish([samples[0].sample_id])
    assert len(store.plans.all()) == 2, "not all of their samples are in this snapshot"
    more = make_samples(1, seed=2)
    store.write_shard(PlannedShard.holding(more), more)
    store.publish([sample.sample_id for sample in (*samples, *more)])
    assert store.plans.all() == []


def test_the_target_alone_names_file_and_record(tmp_path: Path, poisoned: TargetConfig) -> None:
    dataset = _dataset(tmp_path, [5])
    hidden_states(
        target=poisoned, dataset=dataset, store=StoreConfig(shard_tokens=600), home=str(tmp_path)
    )
    target = TargetModel.load(poisoned)
    for path in (tmp_path / "tokens").rglob("*.arrow"):
        bad = [sample for sample in TokenFile(path) if "record 5" in sample.location]
        for sample in bad:
            with pytest.raises(CorruptError, match=r"\(facts\.json, record 5.*aux states are not"):
                list(capture_states(target, [sample]))
