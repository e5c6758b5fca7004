"""Ranks that train on one store decode different shards, and see the batches of one rank."""

import dataclasses
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import storage.reader
from eagle_core.training.loader import (
    _STEPS_AHEAD,
    LoaderState,
    StepShape,
    count_steps,
    steps,
)
from storage.encoding.shard import DecodedShard, decode_shard
from storage.shared_shards import SharedShards
from storage.store import Store
from tests.flows.bridge.lockstep_rank import open_source, read_in_step
from tests.storage.synthetic import fill, make_identity, make_samples
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(
    SharedShards.where_possible(Path()) is None, reason="this system cannot share memory by number"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of many shards, of a few samples each."""
    store = Store.create(str(tmp_path_factory.mktemp("store")), make_identity())
    samples = make_samples(200, tokens=(20, 60))
    fill(store, samples, shard_tokens=200)
    store.publish([sample.sample_id for sample in samples])
    return store


def batches(
    store: Store, folder: Path, shape: StepShape, num_steps: int
) -> Iterator[tuple[str, ...]]:
    """Yield the batches of some steps, which all ranks make in turns."""
    shapes = [dataclasses.replace(shape, rank=rank) for rank in range(shape.world_size)]
    sources = [open_source(store.root.root, folder, one) for one in shapes]
    state = LoaderState(source_id=sources[0].source_id, seed=5)
    streams = [steps(source, state, one) for source, one in zip(sources, shapes, strict=True)]
    try:
        for _ in range(num_steps):
            loaded = [next(stream) for stream in streams]
            for turn in itertools.zip_longest(*(step.batches for step in loaded)):
                yield from (batch.sample_ids for batch in turn if batch is not None)
        yield ()  # the caller may look at the ranks while they work
    finally:
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]  # a generator


def steps_until_all_is_prepared(store: Store, shape: StepShape) -> int:
    """Return the number of steps after which all of the first epoch is prepared, and no more."""
    snapshot = store.snapshot()
    num_steps = count_steps(snapshot.lengths, snapshot.groups, shape, seed=5, epochs=1)
    return num_steps - _STEPS_AHEAD


@pytest.mark.parametrize(
    ("world_size", "window", "batch_tokens"),
    [(1, 4, 150), (2, 4, 150), (3, 4, 60), (2, 2, 500)],
    ids=["one", "two", "three", "steps longer than windows"],
)
def test_ranks_decode_each_shard_once_an_epoch(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    window: int,
    batch_tokens: int,
) -> None:
    decoded: Counter[str] = Counter()

    def counted(shard_id: str, *args: object, **kwargs: object) -> DecodedShard:
        decoded[shard_id] += 1
        return decode_shard(shard_id, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(storage.reader, "decode_shard", counted)
    shape = StepShape(window=window, batch_tokens=batch_tokens, world_size=world_size)
    all_shards = set(store.snapshot().shard_ids)
    seen: list[list[tuple[str, ...]]] = []
    for ranks in (dataclasses.replace(shape, world_size=1), shape):
        num_steps = steps_until_all_is_prepared(store, ranks)
        stream = batches(store, tmp_path / str(len(seen)), ranks, num_steps)
        seen.append(list(itertools.takewhile(bool, stream)))
        wait_for(lambda: set(decoded) == all_shards, what="all shards", every_seconds=0.01)
        stream.close()  # type: ignore[attr-defined]  # a generator
        assert set(decoded.values()) == {1}
        decoded.clear()
    assert seen[1] == seen[0][: len(seen[1])]
    assert len(seen[1]) >= 6


@pytest.mark.slow
def test_processes_decode_each_shard_once(store: Store, tmp_path: Path) -> None:
    shape = StepShape(window=4, batch_tokens=150, world_size=2)
    num_steps = steps_until_all_is_prepared(store, shape)
    spawning = multiprocessing.get_context("spawn")
    with spawning.Manager() as manager, ProcessPoolExecutor(2, mp_context=spawning) as pool:
        barrier = manager.Barrier(2)
        ranks = [
            pool.submit(
                read_in_step,
                store.root.root,
                tmp_path,
                dataclasses.replace(shape, rank=rank),
                num_steps,
                barrier,
            )
            for rank in range(2)
        ]
        seen = [rank.result() for rank in ranks]
    decoded = [(tmp_path / f"decoded-{rank}").read_text().split() for rank in range(2)]
    assert min(map(len, decoded)) > 0
    assert sorted(decoded[0] + decoded[1]) == sorted(store.snapshot().shard_ids)
    assert len({name for names in seen for name in names}) == sum(map(len, seen))
