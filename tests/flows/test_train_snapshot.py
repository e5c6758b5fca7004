"""Which snapshot a run learns from when data, split or store have changed since it began."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import eagle_core.errors
import storage.errors
from eagle_core.data.build import load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_setup import VOCABULARY_NAME
from flows.bridge.run import RUN_NAME, Run, read_run
from flows.config.store import StoreConfig
from flows.export import export_flow
from flows.gc import gc_flow
from flows.hidden_states import hidden_states
from flows.reports.run_record import TRAINING_NAME, RunRecord
from flows.summaries import HiddenStatesSummary, TrainSummary
from flows.train import train_flow
from storage.maintenance.gc import snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests import tiny
from tests.storage.synthetic import committed_samples

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server", "plots_drawn_once")]


class _Data:
    """A data set that changes, its store, and runs over it."""

    def __init__(self, home: Path, target: TargetConfig, store: StoreConfig) -> None:
        self.home, self.target = home, target
        root = home / "stores" / "tiny-grows"
        self.config = store.model_copy(update={"root": str(root)})

    @property
    def store(self) -> Store:
        return Store.open(str(self.config.root))

    def grow_to(
        self, num_conversations: int, *, first: int = 0, name: str = "grows"
    ) -> HiddenStatesSummary:
        self.write(num_conversations, first=first, name=name)
        return hidden_states(
            target=self.target, dataset=self.dataset(name), store=self.config, home=str(self.home)
        )

    def write(self, num_conversations: int, *, first: int = 0, name: str = "grows") -> None:
        tiny.write_conversations(self.home / f"{name}.json", num_conversations, first=first)

    def without(self, number: int) -> HiddenStatesSummary:
        """Take a conversation away, and make states of what is left."""
        path = self.home / "grows.json"
        left = [record for place, record in enumerate(self._records()) if place != number]
        path.write_text(json.dumps(left))
        return self.again()

    def again(self) -> HiddenStatesSummary:
        return hidden_states(
            target=self.target, dataset=self.dataset(), store=self.config, home=str(self.home)
        )

    def held_out_numbers(self) -> list[int]:
        """Return which conversations are held out."""
        folder = self.home / "datasets" / "grows"
        first = [record["conversations"][0]["value"] for record in self._records()]
        return [
            first.index(conversation.messages[0].content)
            for conversation in load_conversations(folder, "held_out")
        ]

    def _records(self) -> list[dict[str, Any]]:
        return json.loads((self.home / "grows.json").read_text())  # type: ignore[no-any-return]

    def interrupted(self, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
        """Train, and die after the last checkpoint."""
        with monkeypatch.context() as patched:
            patched.setattr("flows.tasks.run_training.write_stage", _fails)
            with pytest.raises(RuntimeError, match="killed"):
                self.train(**how)

    def gc(self) -> None:
        gc_flow(
            self.target,
            self.dataset(),
            self.config,
            home=str(self.home),
            older_than_hours=0,
            delete=True,
        )

    def train(
        self,
        *,
        max_steps: int = 1,
        held_out: float = 0.2,
        run: str = "main",
        name: str = "grows",
        snapshot_id: str | None = None,
        extend: Literal["keep", "restretch"] | None = "keep",
    ) -> TrainSummary:
        training = TrainingConfig(
            dtype="float32",
            draft_vocab_size=300,
            ttt_length=2,
            max_steps=max_steps,
            extend=extend,
        )
        return train_flow(
            target=self.target,
            dataset=self.dataset(name, held_out),
            store=self.config,
            training=training,
            home=str(self.home),
            run=run,
            snapshot_id=snapshot_id,
        )

    def dataset(self, name: str = "grows", held_out_fraction: float = 0.2) -> DatasetConfig:
        return DatasetConfig(
            name=name,
            source=str(self.home / f"{name}.json"),
            held_out_fraction=held_out_fraction,
            max_length=256,
        )

    def tokens(self, trained: TrainSummary, split: str = "train") -> set[str]:
        """Return the samples of the token file that a run names as its own."""
        run = _run(trained)
        folder = self.home / "tokens" / f"tiny-{run.dataset.name}"
        return set(TokenFile(folder / f"{split}-{run.tokens}.arrow").sample_ids)

    def members(self, trained: TrainSummary) -> set[str]:
        return {name.hex() for name in self.store.snapshot(trained.source_id).members}


@pytest.fixture
def data(tmp_path: Path, target: TargetConfig, store: StoreConfig) -> _Data:
    return _Data(tmp_path, target, store)


def _run(trained: TrainSummary) -> Run:
    run = read_run(trained.run_path)
    assert run is not None
    return run


def test_a_run_that_has_begun_goes_on_with_its_own_snapshot_and_reads_no_data_set(
    data: _Data, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = data.grow_to(20)
    first = data.train(max_steps=1)
    record = (first.run_path / RUN_NAME).read_text()
    assert (first.source_id, _run(first).source_id) == (old.snapshot_id, old.snapshot_id)
    again = data.train(max_steps=1)
    kept = (first.tokens_per_second, first.seconds)
    assert (again.tokens_per_second, again.seconds) == kept, "what is done keeps its figures"

    new = data.grow_to(40)
    assert new.snapshot_id != old.snapshot_id
    with pytest.raises(eagle_core.errors.MismatchError, match=r"has done its 1 steps.*--run"):
        data.train(max_steps=1)  # an exit status of 0 would say that it learned from the new data
    (data.home / "grows.json").unlink()
    with monkeypatch.context() as patched:
        patched.delattr("flows.tasks.prepare.prepare_dataset")
        gone_on = data.train(max_steps=2)
    assert (gone_on.source_id, gone_on.num_steps) == (old.snapshot_id, 2)
    assert f"is snapshot {new.snapshot_id}" in caplog.text
    assert "the run continues with its own data" in caplog.text
    assert data.members(gone_on) == data.tokens(gone_on)
    settings = RunRecord.read(first.run_path).settings
    assert settings is not None
    assert settings.train.num_samples == len(data.tokens(first)) < 20
    assert settings.configuration["training"]["max_steps"] == 2
    after = Run.model_validate_json((first.run_path / RUN_NAME).read_text())
    changed = {"training": Run.model_validate_json(record).training}
    assert after.training.max_steps == 2
    assert after.model_copy(update=changed) == Run.model_validate_json(record), "else written once"
    with pytest.raises(eagle_core.errors.MismatchError, match=f"not on {new.snapshot_id}"):
        data.train(max_steps=3, snapshot_id=new.snapshot_id)
    data.write(40)
    assert data.train(max_steps=1, run="fresh").source_id == new.snapshot_id


def test_a_run_of_a_version_without_run_json_goes_on_with_its_own(data: _Data) -> None:
    old = data.grow_to(20)
    first = data.train(max_steps=1)
    (first.run_path / RUN_NAME).unlink()
    data.grow_to(40)
    gone_on = data.train(max_steps=2)
    assert (gone_on.source_id, gone_on.num_steps) == (old.snapshot_id, 2)
    assert data.members(gone_on) == data.tokens(gone_on)


def test_garbage_collection_keeps_what_a_run_needs_that_has_not_ended(
    data: _Data, target: TargetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples and its held-out ones, which the data set may not have any more."""
    fine = data.config.model_copy(update={"shard_tokens": 1})  # one sample a shard
    data = _Data(tmp_path, target, fine)
    old = data.grow_to(20)
    data.interrupted(monkeypatch, max_steps=1)
    data.write(24)
    new = data.without(data.held_out_numbers()[0])
    data.gc()
    assert {old.snapshot_id, new.snapshot_id} <= set(data.store.snapshot_ids())
    ended = data.train(max_steps=2)
    assert ended.source_id == old.snapshot_id
    assert not data.store.refs.held()
    data.gc()
    assert old.snapshot_id not in data.store.snapshot_ids()
    assert verify_store(data.store, deep=True) == []
    with pytest.raises(eagle_core.errors.MismatchError, match=r"1 of 5 samples that .* holds out"):
        data.train(max_steps=3)


def test_a_run_holds_for_itself_alone(
    data: _Data, target: TargetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for its namesake on another machine; and not what an attempt before it held."""
    old = data.grow_to(20)
    data.interrupted(monkeypatch, max_steps=1)
    held = data.store.refs.held()
    elsewhere = _Data(tmp_path / "elsewhere", target, data.config)
    elsewhere.home.mkdir()
    elsewhere.config = data.config
    elsewhere.write(20)
    elsewhere.train()
    assert data.store.refs.held() == held
    (run_path,) = (data.home / "runs").iterdir()
    shutil.rmtree(run_path)
    data.train()
    (run,) = {run for run, _ in data.store.refs.held()}
    assert run.startswith("tiny-grows-main.")
    assert old.snapshot_id in snapshots_to_keep(data.store, older_than_hours=0)
    with pytest.raises(storage.errors.ConfigError, match=f"for run gone; it does for: {run}"):
        snapshots_to_keep(data.store, released=["gone"], older_than_hours=0)
    gc_flow(target, data.dataset(), data.config, home=str(data.home), release=(run,))
    assert data.store.refs.held(), "nothing goes unasked"
    gc_flow(target, data.dataset(), data.config, home=str(data.home), release=(run,), delete=True)
    assert not data.store.refs.held()


def test_a_lost_snapshot_is_published_again_where_all_its_states_are_there(data: _Data) -> None:
    """A run of a version before held nothing, and garbage collection took its snapshot."""
    old = data.grow_to(20)
    data.train(max_steps=1)
    data.grow_to(40)
    data.gc()
    assert old.snapshot_id not in data.store.snapshot_ids()
    assert data.train(max_steps=2).source_id == old.snapshot_id


def _fails(*_arguments: object) -> None:
    raise RuntimeError("killed")


def test_a_run_does_not_go_on_with_data_that_was_replaced(data: _Data) -> None:
    """The data was wrong, somebody stopped the run, mended the data and started it again.

    A pilot on a part of the data replaces nothing.
    """
    whole = data.grow_to(20)
    data.train(max_steps=1)
    pilot = hidden_states(
        data.target, data.dataset(held_out_fraction=0.8), data.config, home=str(data.home)
    )
    assert pilot.snapshot_id != whole.snapshot_id
    assert data.train(max_steps=2).source_id == whole.snapshot_id
    data.grow_to(20, first=100)
    with pytest.raises(eagle_core.errors.MismatchError, match="If the data was replaced, train"):
        data.train(max_steps=3)
    assert data.train(max_steps=3, snapshot_id=whole.snapshot_id).num_steps == 3, "told so"


def test_of_versions_with_one_train_split_the_one_that_was_made_last_is_held_out(
    data: _Data,
) -> None:
    data.grow_to(60)
    number = next(one for one in data.held_out_numbers() if one >= 20)
    first = data.grow_to(20)
    records = json.loads((data.home / "grows.json").read_text())
    tiny.write_conversations(data.home / "grows.json", 1, first=number)
    extra = json.loads((data.home / "grows.json").read_text())
    (data.home / "grows.json").write_text(json.dumps(records + extra))
    more = data.again()
    assert more.snapshot_id == first.snapshot_id
    data.write(20)
    data.again()
    named = data.train(run="named", snapshot_id=first.snapshot_id)
    assert _run(named).tokens == _run(data.train(run="plain")).tokens


def test_a_run_learns_from_the_snapshot_that_it_is_told(data: _Data) -> None:
    """The automation names both the run and its snapshot; older ones name only the run."""
    old = data.grow_to(20)
    new = data.grow_to(40)
    for run, told in (("of-old", old.snapshot_id), (old.snapshot_id, None)):
        trained = data.train(run=run, snapshot_id=told)
        assert trained.source_id == old.snapshot_id
        assert data.members(trained) == data.tokens(trained), "its vocabulary is of the same data"
        assert not data.members(trained) & data.tokens(trained, "held_out")
    assert data.train(run=new.snapshot_id).source_id == new.snapshot_id
    with pytest.raises(storage.errors.ConfigError, match="no snapshot feed"):
        data.train(run="none", snapshot_id="feed")


def test_a_snapshot_of_other_data_is_refused(data: _Data) -> None:
    data.grow_to(20)
    other = data.grow_to(20, first=100, name="other")
    with pytest.raises(eagle_core.errors.MismatchError, match=r"has 0 for tr.*holds out 0"):
        data.train(snapshot_id=other.snapshot_id)
    held_out = data.store.refs.names()["grows-held_out"]
    with pytest.raises(
        eagle_core.errors.MismatchError, match=r"0 for training and holds out [1-9]"
    ):
        data.train(snapshot_id=held_out)


def test_another_split_of_stored_samples_is_learned_from_as_it_is_now(data: _Data) -> None:
    """Trained on what is held out now, it would be measured on what it knows."""
    states = data.grow_to(30)
    trained = data.train(held_out=0.5)
    assert trained.source_id != states.snapshot_id
    assert data.members(trained) == data.tokens(trained)
    assert not data.members(trained) & data.tokens(trained, "held_out")
    assert data.store.refs.names()["grows-train"] == states.snapshot_id, "of hidden-states alone"
    kept = data.train(held_out=0.2, max_steps=2)  # the run has begun: it keeps its own
    assert kept.source_id == trained.source_id


def test_samples_without_states_are_counted(data: _Data) -> None:
    states = data.grow_to(20)
    data.write(40)
    with pytest.raises(eagle_core.errors.ConfigError) as error:
        data.train()
    assert "holds 20 of 40 samples of data set grows; run hidden-states" in str(error.value)
    assert f"--snapshot {states.snapshot_id}" in str(error.value)
    assert data.train(snapshot_id=states.snapshot_id).source_id == states.snapshot_id


def test_what_is_held_out_is_refused_in_a_snapshot(data: _Data) -> None:
    """Somebody published all samples together."""
    data.grow_to(20)
    everything = data.store.publish(sorted(committed_samples(data.store))).snapshot_id
    with pytest.raises(eagle_core.errors.MismatchError, match=r"holds out [1-9]"):
        data.train(snapshot_id=everything)
    trained = data.train()
    folder, content = data.home / "tokens" / "tiny-grows", _run(trained).tokens
    shutil.copy(folder / f"train-{content}.arrow", folder / f"held_out-{content}.arrow")
    with pytest.raises(eagle_core.errors.MismatchError, match="must not be trained on"):
        data.train(max_steps=2)


def test_token_files_that_are_gone_are_made_again_or_named(data: _Data) -> None:
    data.grow_to(20)
    trained = data.train()
    folder = data.home / "tokens" / "tiny-grows"
    for path in folder.glob("*.arrow"):
        path.unlink()
    assert data.train(max_steps=2).source_id == trained.source_id
    data.write(10)
    for path in folder.glob("*.arrow"):
        path.unlink()
    with pytest.raises(eagle_core.errors.ConfigError, match=r"token files of run .* are gone"):
        data.train(max_steps=3)


def test_a_finished_run_that_was_extended_and_died_goes_on(
    data: _Data, caplog: pytest.LogCaptureFixture
) -> None:
    data.grow_to(20)
    first = data.train(max_steps=1)
    ended = (first.run_path / TRAINING_NAME).read_text()
    with pytest.raises(eagle_core.errors.MismatchError, match=r"training\.extend=keep .*restretch"):
        data.train(max_steps=2, extend=None)
    caplog.set_level(logging.INFO, logger="flows")
    extended = data.train(max_steps=2)
    assert "goes on at step 1 of 2: its learning rate, now" in caplog.text
    data.train(max_steps=1)
    assert "has done 2 steps, and 1 are requested: there is nothing to do" in caplog.text
    (first.run_path / TRAINING_NAME).write_text(ended)
    again = data.train(max_steps=3)
    assert (again.source_id, again.num_steps) == (extended.source_id, 3)
    assert again.tokens_per_second != first.tokens_per_second

    vocabulary = first.run_path / VOCABULARY_NAME
    vocabulary.unlink()
    data.train(max_steps=4)  # makes it again
    DraftVocabulary.build(np.arange(3000), size=300).save(vocabulary)
    with pytest.raises(eagle_core.errors.MismatchError, match="is not the draft vocabulary that"):
        export_flow(data.target, data.dataset(), home=str(data.home))
    vocabulary.unlink()
    with pytest.raises(eagle_core.errors.ConfigError, match=r"eyas run train\) to build it"):
        export_flow(data.target, data.dataset(), home=str(data.home))

    path = first.run_path / RUN_NAME
    assert _run(first).training.max_steps == 4, "of the newest attempt"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(eagle_core.errors.ConfigError, match=r"has version 2.*use the newer one"):
        data.train(max_steps=4)
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    document = json.loads(path.read_text())
    del document["tokens"]
    path.write_text(json.dumps(document))
    with pytest.raises(eagle_core.errors.CorruptError, match=r"run\.json is damaged.*\(tokens: "):
        data.train(max_steps=4)
