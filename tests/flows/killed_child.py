"""A shard process that is killed when one shard is committed and more are to come."""

import os
import signal
import subprocess
import sys

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.bridge.store_identity import store_identity
from flows.config.store import StoreConfig
from flows.tasks.plan_shards import plan_missing_shards
from flows.tasks.prepare import prepare_dataset
from flows.tasks.tokenize import tokenize
from flows.workers.channel import Channel
from flows.workers.shard_batch import ShardBatch, ShardReport
from flows.workspace import Workspace
from storage.store import Store


@flow
def plan_only(
    target: TargetConfig, dataset: DatasetConfig, store: StoreConfig, home: str
) -> ShardBatch:
    """Go as far as `hidden-states` does before the first shard."""
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    prepare_dataset(dataset, space)
    tokens = tokenize(target, dataset, space)
    root = str(space.store_root)
    opened = Store.create(root, store_identity(target, store, tokens))
    plan = plan_missing_shards(opened, tokens, shard_tokens=store.shard_tokens)
    return ShardBatch(
        target=target,
        store_root=root,
        plan_id=plan.plan_id,
        shard_ids=tuple(shard.shard_id for shard in plan.shards),
        token_files=(tokens.train_path, tokens.held_out_path),
    )


def kill_in_second_shard(batch: ShardBatch) -> None:
    """Run the shard process and kill it as soon as it has computed a sample of its second shard."""
    channel = Channel()
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.workers.shard_worker"],
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, **channel.environment},
    )
    with child:
        assert child.stdin is not None
        child.stdin.write(batch.model_dump_json())
        child.stdin.close()
        committed = 0
        for line in channel.lines(lambda: child.poll() is not None):
            report = ShardReport.model_validate_json(line)
            committed += report.kind == "shard"
            if committed and report.kind == "tokens":
                child.send_signal(signal.SIGKILL)
                break
        assert child.wait() == -signal.SIGKILL
    channel.close()
