"""The whole way with the store on S3: generation in a child process, training through the cache."""

from pathlib import Path

import pytest
import s3fs

from eagle_core.dataset_config import DatasetConfig
from eagle_core.target_config import TargetConfig
from eagle_core.training_config import TrainingConfig
from flows.config import StoreConfig
from flows.hidden_states import hidden_states
from flows.train import train_flow
from storage.store import Store
from tests.flows.trees import digests
from tests.storage.seaweed import BUCKET, seaweed

pytestmark = [pytest.mark.server, pytest.mark.s3, pytest.mark.usefixtures("prefect_server")]


def test_a_store_on_s3_holds_and_teaches_the_same(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainingConfig(draft_vocab_size=200, ttt_length=2, max_steps=4, batch_tokens=512)
    local = StoreConfig(shard_tokens=2000)
    here = hidden_states(target=target, dataset=dataset, store=local, home=str(tmp_path))
    (tmp_path / "weed").mkdir()
    with seaweed(tmp_path / "weed") as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # it knows nothing of changed variables
        remote = StoreConfig(shard_tokens=2000, root=f"s3://{BUCKET}/states", cache_bytes=10**9)
        there = hidden_states(target=target, dataset=dataset, store=remote, home=str(tmp_path))
        assert there.snapshot_id == here.snapshot_id
        stored = Store.open(there.store_root)
        assert stored.verify(deep=True) == []
        assert stored.commits() == Store.open(here.store_root).commits()
        losses = [
            train_flow(
                target=target,
                dataset=dataset,
                store=store,
                training=training,
                home=str(tmp_path),
                run=run,
            ).figures.loss
            for store, run in ((local, "here"), (remote, "there"))
        ]
        assert losses[0] == losses[1]
        cached = digests(tmp_path / "cache" / "objects")
        assert len(cached) > 20
        used = sum(path.stat().st_size for path in (tmp_path / "cache" / "objects").iterdir())
        assert 0 < used <= remote.cache_bytes
