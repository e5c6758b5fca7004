"""One of several ranks that read a store in step, each in its own process."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import storage.reader
from eagle_core.training.loader import LoaderState, StepShape, steps, windows_in_use
from flows.bridge.stored_source import StoredSource
from storage.encoding.shard import DecodedShard, decode_shard
from storage.shared_shards import SharedShards
from storage.store import Store
from tests.waiting import wait_for


class Barrier(Protocol):
    """What all ranks wait at after each step, as for each other's gradients."""

    def wait(self, timeout: float | None = None) -> int: ...


def open_source(root: str, folder: Path, shape: StepShape) -> StoredSource:
    """Return the samples of a store, with room for what `shape` has in use."""
    store = Store.open(root)
    snapshot = store.snapshot()
    largest = store.commits().totals.largest_raw_bytes
    num_shards, tokens = len(snapshot.shard_ids), int(snapshot.lengths.sum())
    windows = windows_in_use(shape, tokens=tokens, num_groups=num_shards)
    cache_bytes = windows * shape.window * largest
    reader = store.reader(snapshot, cache_bytes=cache_bytes, shared=SharedShards(folder))
    return StoredSource(reader, None)


def read_in_step(
    root: str, folder: Path, shape: StepShape, num_steps: int, barrier: Barrier
) -> Sequence[str]:
    """Make steps; write the shards that were decoded here to a file of this rank."""
    source = open_source(root, folder, shape)
    with (folder / f"decoded-{shape.rank}").open("w", buffering=1) as log:

        def logged(shard_id: str, *args: object, **kwargs: object) -> DecodedShard:
            log.write(f"{shard_id}\n")
            return decode_shard(shard_id, *args, **kwargs)  # type: ignore[arg-type]

        storage.reader.decode_shard = logged  # type: ignore[attr-defined]
        state = LoaderState(source_id=source.source_id, seed=5)
        stream = steps(source, state, shape)
        names: list[str] = []
        for loaded in islice(stream, num_steps):
            names += [name for batch in loaded.batches for name in batch.sample_ids]
            barrier.wait()
        wait_for(
            lambda: len(decoded(folder)) == source.groups[-1] + 1,
            what="all shards of the epoch, which are prepared by now",
        )
        barrier.wait()  # what one rank decoded lives as long as it does
        return names


def decoded(folder: Path) -> set[str]:
    """Return the shards that any rank decoded."""
    return {name for log in folder.glob("decoded-*") for name in log.read_text().split()}
