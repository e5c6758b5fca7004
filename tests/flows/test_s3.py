"""The whole way with the store on S3: generation in a child process, training through the cache."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
from prefect.blocks.system import Secret

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig
from flows.hidden_states import hidden_states
from flows.orchestration.credentials import store_root
from flows.repair import repair_flow
from flows.train import train_flow
from flows.workspace import Workspace
from storage.errors import ConfigError
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.flows.trees import digests
from tests.storage.seaweed import BUCKET, seaweed
from tests.storage.synthetic import data_key, nameless_commits

pytestmark = [pytest.mark.server, pytest.mark.s3, pytest.mark.usefixtures("prefect_server")]


def test_a_store_on_s3_holds_and_teaches_the_same(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, caplog: pytest.LogCaptureFixture
) -> None:
    training = TrainingConfig(
        dtype="float32", draft_vocab_size=200, ttt_length=2, max_steps=4, batch_tokens=512
    )
    local = StoreConfig(shard_tokens=2000)
    here = hidden_states(target=target, dataset=dataset, store=local, home=str(tmp_path))
    (tmp_path / "weed").mkdir()
    with seaweed(tmp_path / "weed") as server, mock.patch.dict(os.environ):
        Secret(value=server.variables).save("lake")  # type: ignore[unused-coroutine]
        remote = StoreConfig(
            shard_tokens=2000,
            root=f"s3://{BUCKET}/states",
            credentials="lake",
            cache_bytes=10**9,
        )
        there = hidden_states(target=target, dataset=dataset, store=remote, home=str(tmp_path))
        assert there.snapshot_id == here.snapshot_id
        stored = Store.open(there.store_root)
        assert verify_store(stored, deep=True) == []
        assert nameless_commits(stored) == nameless_commits(Store.open(here.store_root))
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
        assert len(cached) > 2
        used = sum(path.stat().st_size for path in (tmp_path / "cache" / "objects").iterdir())
        assert 0 < used <= remote.cache_bytes
        damaged = stored.shard_ids()[0]
        stored.root.write(data_key(stored, damaged), b"damaged")
        repaired = repair_flow(target=target, dataset=dataset, store=remote, home=str(tmp_path))
        assert repaired.remade == (damaged,)
        assert nameless_commits(stored) == nameless_commits(Store.open(here.store_root))
        assert verify_store(stored, deep=True) == []
        assert str(remote.root) in caplog.text, "the log was listened to"
        assert server.secret_key not in caplog.text


def test_a_block_that_is_not_there_or_holds_something_else_is_refused(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    def refused(name: str, root: str | None = "s3://eyas/states") -> str:
        with pytest.raises(ConfigError) as caught:
            store_root(StoreConfig(root=root, credentials=name), space)
        return str(caught.value)

    space = Workspace(home=tmp_path, target=target.name, dataset=dataset.name)
    assert "secret/nowhere" in refused("nowhere")
    Secret(value="sesame").save("word")  # type: ignore[unused-coroutine]
    assert "must hold a JSON object" in refused("word")
    assert "sesame" not in refused("word")
    Secret(value={"PATH": "/elsewhere"}).save("path")  # type: ignore[unused-coroutine]
    assert "AWS_ACCESS_KEY_ID" in refused("path")
    assert "needs none" in refused("word", root=None)
    Secret(value=json.dumps({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})).save("text")  # type: ignore[unused-coroutine]
    with mock.patch.dict(os.environ):
        config = StoreConfig(root="s3://eyas/states", credentials="text")
        assert store_root(config, space) == "s3://eyas/states"
        assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9"
