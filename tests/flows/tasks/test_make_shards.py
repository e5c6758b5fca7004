"""What a run says of batches that a cluster had computed before, and whose results got lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from prefect.states import Completed

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.hidden_states import hidden_states
from flows.tasks import make_shards as module
from flows.tasks.prepare import prepare
from flows.workers.shard_batch import ShardPlan
from storage.records.plan import PlannedShard
from storage.store import Store

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


def test_batches_without_news_count_as_done(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    home = str(tmp_path)
    made = hidden_states(target=target, dataset=dataset, store=store, home=home)
    stored = Store.open(made.store_root)
    shards = [
        PlannedShard(shard_id=name, sample_ids=record.sample_ids, num_tokens=record.num_tokens)
        for name, record in stored.commits().items()
    ]
    advanced: list[int] = []

    @contextmanager
    def progress(*_: object, total: int, **__: object) -> Iterator[SimpleNamespace]:
        assert total == made.num_tokens
        yield SimpleNamespace(advance=advanced.append)

    @contextmanager
    def cluster(*_: object, **__: object) -> Iterator[object]:
        yield lambda _batch: SimpleNamespace(wait=list, state=Completed(), result=tuple)

    with (
        mock.patch.object(module, "stage_progress", progress),
        mock.patch.object(module, "running", cluster),
    ):
        num_made = module.make_shards(
            stored,
            ShardPlan(plan_id="again", shards=tuple(shards)),
            target,
            store,
            RunnerConfig(kind="dask"),
            prepare(target, dataset, home)[1],
        )
    assert num_made == made.num_shards
    assert len(advanced) > 1
    assert sum(advanced) == made.num_tokens
