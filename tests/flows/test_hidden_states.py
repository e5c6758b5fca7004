"""The hidden-states flow with a real target, a real store and a real Prefect server."""

import json
from pathlib import Path

import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from pydantic import ValidationError
from transformers import AutoTokenizer

import eagle_core.errors
import storage.errors
from eagle_core.data.build import load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.writer import SPLITS
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from eagle_core.training.config import TrainingConfig
from flows.bridge.run import read_run
from flows.bridge.store_identity import as_in_store
from flows.config.store import StoreConfig
from flows.estimate import estimate_flow
from flows.hidden_states import hidden_states
from flows.orchestration.artifact_key import artifact_key
from flows.plan import plan
from flows.train import train_flow
from flows.verify import verify_flow
from flows.workers.shard_worker import _samples_of
from flows.workspace import Workspace
from storage.errors import MismatchError
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.records.plan import PlannedSample, PlannedShard, plan_shards
from storage.samples import TTT_LENGTH
from storage.store import Store
from tests import tiny
from tests.flows.killed_child import kill_in_second_shard, plan_only
from tests.flows.trees import digests

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


def _task_run_names() -> list[str]:
    with get_client(sync_client=True) as client:
        return [run.name for run in client.read_task_runs()]


def test_makes_a_complete_store_and_then_has_nothing_left_to_do(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[object] = []
    monkeypatch.setattr(
        "flows.hidden_states.send", lambda _event, *, payload, **_: sent.append(payload)
    )
    first = hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    assert first.shards_made == first.num_shards > 2
    opened = Store.open(first.store_root)
    assert verify_store(opened, deep=True) == []
    assert opened.snapshot().snapshot_id == first.snapshot_id
    before = digests(Path(first.store_root))

    second = hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    assert second.shards_made == 0
    assert second.snapshot_id == first.snapshot_id
    assert digests(Path(first.store_root)) == before
    news = {"snapshot_id": first.snapshot_id, "shards_made": first.shards_made}
    assert sent == [news], "nothing new is no event: an automation would train once more"


def test_a_person_sees_what_the_draft_will_learn(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    space = Workspace(home=tmp_path, target=target.name, dataset=dataset.name)
    (page,) = space.tokens_path.glob("*.html")
    assert page.read_text().count("<mark>") > 5
    key = artifact_key("tokens", target.name, dataset.name)
    named = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=named)
    (artifact,) = [one for one in found if str(page) in one.data]
    assert "| supervised |" in artifact.data
    assert "«" in artifact.data


def _rendered(target: TargetConfig, texts: list[str]) -> str:
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": text}
        for index, text in enumerate(texts)
    ]
    tokenizer = AutoTokenizer.from_pretrained(target.model)
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def test_a_sample_that_both_splits_would_have_is_held_out(
    tmp_path: Path, target: TargetConfig, store: StoreConfig
) -> None:
    """Different rendered texts that are cut where they are still the same.

    Turns with one first question are in one split; where the template is not known, it is not read.
    """
    lasting = "Tell me of rivers and of tides. " * 40
    turns = ["Please.", lasting]
    alike = [[*turns, f"{n}?", lasting] for n in range(12)]
    others = [[f"Tell me fact {n}.", f"Well: {n}."] for n in range(20)]
    records = [{"text": _rendered(target, texts)} for texts in [*alike, *others]]
    source = tmp_path / "alike.json"
    source.write_text(json.dumps(records))
    dataset = DatasetConfig(
        name="alike",
        source=str(source),
        rendered_text="text",
        held_out_fraction=0.4,
        max_length=128,
    )
    made = hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    space = Workspace(home=tmp_path, target=target.name, dataset=dataset.name)
    (held_out,) = space.tokens_path.glob("held_out-*.arrow")
    (train,) = space.tokens_path.glob("train-*.arrow")
    splits = [set(TokenFile(path).sample_ids) for path in (held_out, train)]
    assert made.num_samples == len(splits[0] | splits[1]) == len(splits[0]) + len(splits[1]) == 21
    texts = {record["text"] for record in records[:12]}
    for split in SPLITS:  # without the check, the sample would be in both
        conversations = load_conversations(space.dataset_path, split)
        assert any(one.rendered_text in texts for one in conversations)


def test_a_shard_of_token_files_with_one_sample_in_both_is_made(tmp_path: Path) -> None:
    """As files of another version may have it."""
    ids, mask = np.arange(9, dtype=np.int32), np.ones(9, dtype=np.bool_)
    sample = TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)
    files = [write_token_file(tmp_path / f"{n}.arrow", [sample]) for n in range(2)]
    (shard,) = plan_shards(
        [PlannedSample(sample_id=sample.sample_id, num_tokens=9)], committed=(), shard_tokens=99
    ).shards
    assert [one.sample_id for one in _samples_of(shard, files)] == [sample.sample_id]
    other = PlannedShard(shard_id=shard.shard_id, sample_ids=("00" * 16,), num_tokens=9)
    with pytest.raises(eagle_core.errors.MismatchError, match="1 of them are in no token file"):
        _samples_of(other, files)


def test_training_takes_the_states_of_its_own_data_set(
    tmp_path: Path, target: TargetConfig, store: StoreConfig
) -> None:
    """Whatever was published last in the store that it shares with others."""
    shared = store.model_copy(update={"root": str(tmp_path / "shared")})
    made = {}
    for name, first in (("ours", 0), ("theirs", 40)):
        source = tiny.write_conversations(tmp_path / f"{name}.json", 30, first=first)
        dataset = DatasetConfig(
            name=name, source=str(source), held_out_fraction=0.2, max_length=256
        )
        made[name] = (
            hidden_states(target=target, dataset=dataset, store=shared, home=str(tmp_path)),
            dataset,
        )
    training = TrainingConfig(dtype="float32", draft_vocab_size=300, max_steps=1)
    for summary, dataset in made.values():
        trained = train_flow(
            target=target, dataset=dataset, store=shared, training=training, home=str(tmp_path)
        )
        settings = (trained.run_path / "settings.json").read_text()
        assert summary.snapshot_id in settings
        record = read_run(trained.run_path)
        assert record is not None
        assert (record.source_id, record.dataset) == (summary.snapshot_id, dataset)
    other = training.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(eagle_core.errors.MismatchError, match=r"learning_rate"):
        train_flow(target=target, dataset=dataset, store=shared, training=other, home=str(tmp_path))
    assert (trained.run_path / "settings.json").read_text() == settings  # the refused are nobody's
    source = tiny.write_conversations(tmp_path / "new.json", 30, first=80)
    new = DatasetConfig(name="new", source=str(source), held_out_fraction=0.2, max_length=256)
    with pytest.raises(ConfigError, match="holds 0 of 30 samples of data set new; run hidden-st"):
        train_flow(target=target, dataset=new, store=shared, training=training, home=str(tmp_path))


def test_what_every_batch_meets_for_certain_is_met_once(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred loads of the target onto a GPU that is too small for it help nobody; a batch that
    fails for its samples' sake stops no other."""
    root = tmp_path / "store"
    store = StoreConfig(root=str(root), shard_tokens=400, shards_per_task=1)
    root.mkdir()
    (root / "shards").write_text("a file where the folder of all shards belongs")
    computed: list[int] = []
    monkeypatch.setattr(
        "flows.orchestration.progress.StageProgress.advance",
        lambda _self, amount=1, **_note: computed.append(amount),
    )
    with pytest.raises(storage.errors.ConfigError, match="cannot use"):
        hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    (plan,) = Store.open(str(root)).plans.all()
    assert len(plan.shards) > 8
    sizes = [shard.num_tokens for shard in plan.shards]
    assert sizes[0] <= sum(computed) < sum(sizes[:4])  # the next ones are ended, not awaited


def test_new_conversations_alone_are_computed(
    tmp_path: Path, target: TargetConfig, store: StoreConfig
) -> None:
    source = tiny.write_conversations(tmp_path / "grows.json", 30)
    dataset = DatasetConfig(name="grows", source=str(source), held_out_fraction=0.0, max_length=256)
    first = hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    old_shards = set(Store.open(first.store_root).commits())
    tiny.write_conversations(source, 33)

    second = hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))

    assert second.num_samples == first.num_samples + 3
    assert second.shards_made == 1
    assert old_shards < set(Store.open(second.store_root).commits())


def test_sigkill_in_the_middle_of_a_shard_costs_that_shard_and_no_bit(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    undisturbed = hidden_states(
        target=target, dataset=dataset, store=store, home=str(tmp_path / "undisturbed")
    )
    home = tmp_path / "killed"
    batch = plan_only(target, dataset, store, str(home))
    kill_in_second_shard(batch)
    done = len(Store.open(batch.store_root).commits())
    assert 1 <= done < len(batch.shard_ids)  # the signal may come when a second one is just ended

    resumed = hidden_states(target=target, dataset=dataset, store=store, home=str(home))

    assert resumed.shards_made == len(batch.shard_ids) - done
    opened = Store.open(resumed.store_root)
    kept = snapshots_to_keep(opened, older_than_hours=0)
    left = find_garbage(opened, keep=kept, older_than_hours=0)
    # The signal may come when a file is whole and its record is about to be written.
    assert len(left.leftovers) <= 2
    assert left.snapshot_ids == left.plan_ids == left.shard_ids == ()
    collect(opened, left)
    assert digests(Path(resumed.store_root)) == digests(Path(undisturbed.store_root))


def test_another_target_is_refused_by_name_of_what_differs(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    made = hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    before = digests(Path(made.store_root))
    other = target.model_copy(update={"aux_layers": (0, 3, 4)})

    with pytest.raises(MismatchError, match="aux_layers"):
        hidden_states(target=other, dataset=dataset, store=store, home=str(tmp_path))
    assert digests(Path(made.store_root)) == before


def test_missing_weights_say_what_to_download(
    tmp_path: Path, dataset: DatasetConfig, store: StoreConfig
) -> None:
    absent = TargetConfig(name="llama3", model=str(tmp_path / "models" / "llama3"))
    with pytest.raises(ConfigError, match=r"no model folder at .*llama3.*hf download"):
        hidden_states(target=absent, dataset=dataset, store=store, home=str(tmp_path))
    assert not (tmp_path / "stores").exists()


def test_target_without_chat_template_is_named(
    tmp_path: Path, dataset: DatasetConfig, store: StoreConfig
) -> None:
    folder = tiny.write_target(tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    bare = TargetConfig(name="bare", model=str(folder), dtype="float32")
    with pytest.raises(ConfigError, match=r"bare.*chat template"):
        hidden_states(target=bare, dataset=dataset, store=store, home=str(tmp_path))


def test_truncated_data_file_names_the_offset_and_leaves_nothing(
    tmp_path: Path, target: TargetConfig, store: StoreConfig
) -> None:
    whole = tiny.write_conversations(tmp_path / "whole.json", 5).read_bytes()
    cut = tmp_path / "cut.json"
    cut.write_bytes(whole[: len(whole) - 40])
    dataset = DatasetConfig(name="cut", source=str(cut), max_length=256)
    with pytest.raises(Exception, match=r"cut\.json.*byte \d+, 4 whole records.*accept_truncated"):
        hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path / "home"))
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert left == []


def test_a_longer_training_time_test_than_the_store_keeps_states_for_is_refused() -> None:
    with pytest.raises(ValidationError, match="ttt_length"):
        TrainingConfig(ttt_length=TTT_LENGTH + 1)
    assert TrainingConfig(ttt_length=TTT_LENGTH).ttt_length == TTT_LENGTH


def test_shard_task_names_tell_their_range(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    assert {"plan", "shards 00000-00003", "publish snapshot"} <= set(_task_run_names())


def test_a_dtype_that_is_left_open_is_that_of_the_store(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Made on a machine with units for bfloat16, it can be extended and trained on without."""
    units = "eagle_core.target.model_config.multiplies_bfloat16"
    undecided = target.model_copy(update={"dtype": "auto"})
    made = {}
    for has_units in (True, False):
        monkeypatch.setattr(units, lambda _device, has_units=has_units: has_units)
        home = str(tmp_path / str(has_units))
        made[has_units] = hidden_states(target=undecided, dataset=dataset, store=store, home=home)
    with_units, without = (Store.open(made[key].store_root).identity for key in (True, False))
    assert with_units.target_fields["dtype"] == "bfloat16"
    assert without.target_fields["dtype"] == "float32"

    home = str(tmp_path / "True")  # on a machine without units
    again = hidden_states(target=undecided, dataset=dataset, store=store, home=home)
    assert again.shards_made == 0
    assert plan(target=undecided, dataset=dataset, store=store, home=home).missing_samples == 0
    verify_flow(target=undecided, dataset=dataset, store=store, home=home)
    training = TrainingConfig(dtype="float32", draft_vocab_size=300, max_steps=2, batch_tokens=256)
    train_flow(undecided, dataset, store=store, training=training, home=home)
    summary = estimate_flow(undecided, dataset, store=store, training=training, home=home)
    assert summary.checkpoint_step == 2
    run = read_run(Workspace.at(home, target=target.name, dataset=dataset.name).run_path("main"))
    assert run is not None
    assert run.target.dtype == "auto"  # a command on the run's folder decides anew
    assert run.target_fields["dtype"] == "bfloat16"
    (root,) = {Store.open(made[True].store_root).root.url}
    assert as_in_store(undecided, root, elsewhere=True).dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"set target\.dtype to bfloat16 or float32"):
        as_in_store(undecided, str(tmp_path / "nowhere"), elsewhere=True)
    with pytest.raises(MismatchError, match="target dtype: found 'bfloat16', expected 'float32'"):
        hidden_states(target=target, dataset=dataset, store=store, home=home)
