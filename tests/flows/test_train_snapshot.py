"""Which snapshot a run learns from when data, split or store have changed since it began."""

from pathlib import Path

import pytest

import eagle_core.errors
import storage.errors
from eagle_core.dataset_config import DatasetConfig
from eagle_core.target_config import TargetConfig
from eagle_core.training_config import TrainingConfig
from flows.config import StoreConfig
from flows.hidden_states import hidden_states
from flows.run_record import TRAINING_NAME, RunRecord
from flows.summaries import HiddenStatesSummary, TrainSummary
from flows.train import train_flow
from tests import tiny

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


class _Data:
    """A data set that grows, its store, and runs over it."""

    def __init__(self, home: Path, target: TargetConfig, store: StoreConfig) -> None:
        self._home, self._target, self._store = home, target, store
        self._source = home / "grows.json"

    def grow_to(self, num_conversations: int, *, first: int = 0) -> HiddenStatesSummary:
        tiny.write_conversations(self._source, num_conversations, first=first)
        return hidden_states(
            target=self._target, dataset=self._dataset(0.2), store=self._store, home=str(self._home)
        )

    def train(self, *, max_steps: int, held_out: float = 0.2, run: str = "main") -> TrainSummary:
        training = TrainingConfig(
            dtype="float32", draft_vocab_size=300, ttt_length=2, max_steps=max_steps
        )
        return train_flow(
            target=self._target,
            dataset=self._dataset(held_out),
            store=self._store,
            training=training,
            home=str(self._home),
            run=run,
        )

    def _dataset(self, held_out_fraction: float) -> DatasetConfig:
        return DatasetConfig(
            name="grows",
            source=str(self._source),
            held_out_fraction=held_out_fraction,
            max_length=256,
        )


@pytest.fixture
def data(tmp_path: Path, target: TargetConfig, store: StoreConfig) -> _Data:
    return _Data(tmp_path, target, store)


def test_an_interrupted_run_goes_on_with_its_own_snapshot_after_new_data(
    data: _Data, caplog: pytest.LogCaptureFixture
) -> None:
    old = data.grow_to(20)
    first = data.train(max_steps=1)
    assert first.source_id == old.snapshot_id
    again = data.train(max_steps=1)
    assert again.num_steps == 1
    kept = (first.tokens_per_second, first.seconds)
    assert (again.tokens_per_second, again.seconds) == kept, "what is done keeps its figures"

    new = data.grow_to(40)
    assert new.snapshot_id != old.snapshot_id
    with pytest.raises(eagle_core.errors.MismatchError, match="another run name"):
        data.train(max_steps=2)  # it has ended: nothing says that it should learn of the old data
    ended = (first.run_path / TRAINING_NAME).read_text()
    (first.run_path / TRAINING_NAME).unlink()  # what a run lacks that was interrupted
    gone_on = data.train(max_steps=2)
    assert (gone_on.source_id, gone_on.num_steps) == (old.snapshot_id, 2)
    assert "goes on with the snapshot it began with" in caplog.text
    settings = RunRecord.read(first.run_path).settings
    assert settings is not None
    assert settings.train.num_samples < 20, "the report tells of the data that it learned from"
    (first.run_path / TRAINING_NAME).write_text(ended)  # it had ended at 1, was extended, and died
    extended = data.train(max_steps=3)
    assert (extended.source_id, extended.num_steps) == (old.snapshot_id, 3)
    assert extended.tokens_per_second != first.tokens_per_second
    assert data.train(max_steps=1, run="fresh").source_id == new.snapshot_id


def test_an_interrupted_run_does_not_go_on_with_data_that_was_replaced(data: _Data) -> None:
    """The data was wrong, somebody stopped the run, mended the data and started it again."""
    data.grow_to(20)
    first = data.train(max_steps=1)
    (first.run_path / TRAINING_NAME).unlink()
    data.grow_to(20, first=100)
    with pytest.raises(eagle_core.errors.MismatchError, match="another run name"):
        data.train(max_steps=2)


def test_what_is_held_out_now_is_never_trained_on(data: _Data) -> None:
    data.grow_to(20)
    with pytest.raises(storage.errors.MismatchError, match=r"holds out.*held_out_fraction"):
        data.train(max_steps=1, held_out=0.3)
