"""A store that leaves states out: as good as a whole one, bit for bit, and refused where not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from eagle_core.data.config import DatasetConfig
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.recompute_model import RecomputeModel
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training import checkpoint
from eagle_core.training.config import TrainingConfig
from flows.bridge.stored_source import StoredSource, to_stored
from flows.config.store import StoreConfig
from flows.estimate import estimate_flow
from flows.hidden_states import hidden_states
from flows.repair import repair_flow
from flows.train import train_flow
from storage.errors import ConfigError, MismatchError, ShardCorruptError
from storage.probe import NUM_POINTS
from storage.records.plan import PlannedShard
from storage.store import Store
from tests.flows.outspoken import write_scaling_target
from tests.flows.trees import digests
from tests.storage.synthetic import data_key

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

RECOMPUTE = StoreConfig(shard_tokens=2000, recompute=True)
TRAINING = TrainingConfig(
    dtype="float32", draft_vocab_size=200, ttt_length=2, max_steps=4, batch_tokens=512
)


@pytest.fixture(scope="module")
def target(tiny_target_path: Path) -> TargetConfig:
    """The tiny target, for all tests of this module."""
    return TargetConfig(
        name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu", batch_tokens=512
    )


@pytest.fixture(scope="module")
def dataset(conversations_path: Path) -> DatasetConfig:
    """The small data set, for all tests of this module."""
    return DatasetConfig(
        name="facts", source=str(conversations_path), held_out_fraction=0.2, max_length=256
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder for all tests of this module."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def made(
    home: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    prefect_server: str,  # noqa: ARG001 (a flow needs one)
) -> Store:
    """A store with half of its states, made by the flow."""
    summary = hidden_states(target=target, dataset=dataset, store=RECOMPUTE, home=str(home))
    return Store.open(summary.store_root)


def _write_whole(half: Store, root: Path, home: Path, target: TargetConfig) -> None:
    """Store all states of the same shards, taken from the same kind of forward."""
    whole = Store.create(str(root), replace(half.identity, omitted=None))
    files = [TokenFile(path) for path in sorted((home / "tokens").rglob("*.arrow"))]
    model = TargetModel.load(target)
    for record in half.commits().values():
        shard = PlannedShard(
            shard_id=record.shard_id, sample_ids=record.sample_ids, num_tokens=record.num_tokens
        )
        samples = [
            sample
            for file in files
            for sample in file.by_id([name for name in record.sample_ids if name in file])
        ]
        states = capture_states(model, samples, for_recompute=True)
        whole.write_shard(shard, map(to_stored, states))
    whole.publish([half.snapshot().sample_id(i) for i in range(half.snapshot().num_samples)])


def test_training_from_half_the_states_is_training_from_all_of_them(
    made: Store, tmp_path: Path, home: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    _write_whole(made, tmp_path / "whole", home, target)
    whole = Store.open(str(tmp_path / "whole"))
    assert whole.snapshot().snapshot_id == made.snapshot().snapshot_id
    every, half = (
        sum(record.stored_bytes for record in store.commits().values()) for store in (whole, made)
    )
    assert half < 0.7 * every

    expected = StoredSource(whole.reader(whole.snapshot()), None)
    found = StoredSource(made.reader(made.snapshot()), RecomputeModel.load(target))
    for index in (0, 5):
        for name in ("aux_hidden_states", "last_hidden_state"):
            np.testing.assert_array_equal(
                getattr(found.fetch(index), name), getattr(expected.fetch(index), name)
            )

    weights = []
    for run, store in (
        ("half", RECOMPUTE),
        ("whole", StoreConfig(root=str(tmp_path / "whole"))),
    ):
        summary = train_flow(
            target=target,
            dataset=dataset,
            store=store,
            training=TRAINING,
            home=str(home),
            run=run,
        )
        folder = checkpoint.newest(summary.run_path)
        assert folder is not None
        weights.append(load_file(folder / "draft.safetensors"))
    for name, tensor in weights[0].items():
        assert tensor.equal(weights[1][name]), name
    estimate = estimate_flow(
        target=target,
        dataset=dataset,
        store=RECOMPUTE,
        training=TRAINING,
        home=str(home),
        run="half",
    )
    assert estimate.estimate.num_rounds > 0


def test_records_hold_what_is_left_out_and_a_repair_gives_the_same_bytes(
    made: Store, home: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    for record in made.commits().values():
        assert len(record.probe) == NUM_POINTS
        assert all(len(point.omitted) == 16 for point in record.probe)
    before = digests(Path(made.root.root))
    shard_id = made.shard_ids()[0]
    (Path(made.root.root) / data_key(made, shard_id)).write_bytes(b"damaged")
    summary = repair_flow(target=target, dataset=dataset, store=RECOMPUTE, home=str(home))
    assert summary.remade == (shard_id,)
    assert summary.left == ()
    assert digests(Path(made.root.root)) == before


def test_a_store_is_not_both(
    made: Store, home: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    with pytest.raises(MismatchError, match=r"store\.recompute: found layers \[0, 1\] and \[5, 6"):
        hidden_states(target=target, dataset=dataset, home=str(home))
    with pytest.raises(ConfigError, match="the target that recomputes them is not loaded"):
        StoredSource(made.reader(made.snapshot()), None)


def test_a_target_whose_layers_cannot_be_run_alone_costs_one_shard(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    """Granite scales whatever enters its first layer, states of a later one included."""
    granite = target.model_copy(update={"model": str(write_scaling_target(tmp_path / "granite"))})
    with pytest.raises(
        ShardCorruptError, match=r"differ in bits .*not committed.*cannot be run alone"
    ):
        hidden_states(target=granite, dataset=dataset, store=RECOMPUTE, home=str(tmp_path))
    (root,) = (tmp_path / "stores").iterdir()
    assert not Store.open(str(root)).shard_ids()
