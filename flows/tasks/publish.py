"""Publish the snapshots of a data set."""

import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from eagle_core.errors import CorruptError
from eagle_core.tokenization.token_file import TokenFile
from flows.summaries import HiddenStatesSummary, TokensSummary
from flows.workspace import Workspace
from storage.store import Store


@task(task_run_name="publish snapshot", cache_policy=NO_CACHE, persist_result=False)
def publish(
    store: Store, tokens: TokensSummary, space: Workspace, *, shards_made: int, started: float
) -> HiddenStatesSummary:
    """Publish the snapshots of both splits by name, training as the latest; return the totals."""
    commits = store.commits()
    held_out = commits.usable(TokenFile(tokens.held_out_path).sample_ids)
    if held_out:
        # The snapshot keeps its shards from garbage collection.
        name = space.snapshot_name("held_out")
        store.publish(
            held_out, commits=commits, name=name, made_from=tokens.content, as_latest=False
        )
    train = commits.usable(TokenFile(tokens.train_path).sample_ids)
    if not train:
        raise CorruptError(
            f"there is no sample to train on: all of {tokens.num_samples:,} are excluded or held "
            f"out; `eyas inspect {store.root.url}` lists the excluded ones"
        )
    name = space.snapshot_name("train")
    snapshot = store.publish(train, commits=commits, name=name, made_from=tokens.content)
    totals = commits.totals
    return HiddenStatesSummary(
        store_root=store.root.url,
        snapshot_id=snapshot.snapshot_id,
        profile=store.identity.profile,
        num_samples=totals.num_samples,
        num_tokens=totals.num_tokens,
        num_supervised_tokens=totals.num_supervised,
        num_shards=totals.num_shards,
        num_excluded=tokens.num_samples - len(train) - len(held_out),
        shards_made=shards_made,
        raw_bytes=totals.raw_bytes,
        stored_bytes=totals.stored_bytes,
        seconds=time.monotonic() - started,
    )
