"""Flows with a target of which one layer at a time is in memory."""

from math import prod
from pathlib import Path

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.safetensors_files import read_headers
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig
from flows.evaluate import evaluate_flow
from flows.hidden_states import hidden_states
from flows.offline import offline
from flows.online import online
from flows.plan import plan
from flows.repair import repair_flow
from flows.reports.rows import offline_rows
from flows.reports.store_tables import cost_rows
from flows.workers.shard_batch import ShardBatch
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.flows.killed_child import kill_in_second_shard, plan_only
from tests.flows.trees import digests

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

TRAINING = TrainingConfig(dtype="float32", draft_vocab_size=300, max_steps=3, batch_tokens=256)
EVALUATION = EvaluationConfig(num_prompts=1, max_new_tokens=4)


@pytest.fixture
def streamed(target: TargetConfig) -> TargetConfig:
    """The tiny target, of which a pass takes the tokens of two shards."""
    return target.model_copy(update={"placement": "streamed", "stream_tokens": 1300})


def test_a_store_is_the_same_even_after_a_kill_in_the_middle_of_a_pass(
    tmp_path: Path,
    target: TargetConfig,
    streamed: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
) -> None:
    config = store.model_copy(update={"recompute": True})
    whole = hidden_states(target=target, dataset=dataset, store=config, home=str(tmp_path / "a"))
    batch: ShardBatch = plan_only(streamed, dataset, config, str(tmp_path / "b"))
    kill_in_second_shard(batch)
    made = Store.open(batch.store_root).shard_ids()
    assert 0 < len(made) < whole.num_shards
    resumed = hidden_states(
        target=streamed, dataset=dataset, store=config, home=str(tmp_path / "b")
    )
    assert resumed.shards_made == whole.num_shards - len(made)
    found = Store.open(resumed.store_root)
    assert verify_store(found, deep=True) == []
    assert found.snapshot().snapshot_id == Store.open(whole.store_root).snapshot().snapshot_id
    kept = snapshots_to_keep(found, older_than_hours=0)
    collect(found, find_garbage(found, keep=kept, older_than_hours=0))  # of the killed process
    assert digests(Path(resumed.store_root)) == digests(Path(whole.store_root))


def test_a_damaged_shard_is_computed_again(
    tmp_path: Path,
    streamed: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
) -> None:
    made = hidden_states(target=streamed, dataset=dataset, store=store, home=str(tmp_path))
    before = digests(Path(made.store_root))
    damaged = max(
        (path for path in Path(made.store_root).rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    repair_flow(target=streamed, dataset=dataset, store=store, home=str(tmp_path))
    assert digests(Path(made.store_root)) == before


def test_a_plan_says_what_is_read(
    tmp_path: Path, streamed: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    estimate = plan(target=streamed, dataset=dataset, store=store, home=str(tmp_path))
    found = estimate.placement
    assert found is not None
    assert found.name == "streamed"
    assert found.pass_tokens == 1300
    tasks, per_task = estimate.missing_tokens / 2400, 2  # four shards of 600 tokens to a task
    assert tasks * per_task <= found.num_passes <= tasks * per_task + 2
    headers = read_headers(Path(streamed.model), remedy="")
    layers = sum(2 * prod(header.shape) for name, header in headers.items() if ".layers." in name)
    assert found.read_bytes == found.num_passes * layers
    (row,) = [text for name, text in cost_rows(estimate) if name == "placement"]
    assert row.startswith(
        f"streamed, one layer at a time: {found.num_passes} passes of up to 1,300"
    )
    assert estimate.tokens_per_second > 0


def test_the_whole_way_ends_with_an_estimate_instead_of_decoding(
    tmp_path: Path, streamed: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    summary = offline(
        streamed, dataset, store, training=TRAINING, evaluation=EVALUATION, home=str(tmp_path)
    )
    assert summary.acceptance is None
    assert summary.estimate is not None
    rows = dict(offline_rows(summary))
    assert rows["acceptance length"] == "not measured: the target is not decoded here"
    assert rows["acceptance length, estimated"]
    with pytest.raises(ConfigError, match=r"set target\.placement to auto, whole or spread"):
        evaluate_flow(
            target=streamed, dataset=dataset, evaluation=EVALUATION, home=str(tmp_path), run="main"
        )


def test_online_a_draft_learns_the_same(
    tmp_path: Path,
    target: TargetConfig,
    streamed: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
) -> None:
    figures = []
    for name, each in (("whole", target), ("streamed", streamed)):
        summary = online(
            each, dataset, store, TRAINING, evaluation=EVALUATION, home=str(tmp_path / name)
        )
        assert (summary.acceptance is None) == (name == "streamed")
        figures.append(summary.training.figures)
    assert figures[0] == figures[1]
