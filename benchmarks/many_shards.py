"""Stores of many shards: opening one, and planning shards for 1 % more data.

`python -m benchmarks.many_shards --results docs/benchmarks/many_shards.md` writes synthetic
stores of 10,000, 100,000 and 1,000,000 shards of 100 samples each: their manifests, with the code
of compaction, and 500 newer single records. They hold no data. Each is then opened and planned in
fresh processes: seconds, and peak resident memory (Linux), imports included. The plan is for all
samples of the store, passed one by one, and 1 % more.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.machine import describe
from storage.objects.digests import ObjectDigest
from storage.records.commit_record import CommitRecord
from storage.records.compaction import MOST_SHARDS
from storage.records.identity import StoreIdentity
from storage.records.manifest import Manifest
from storage.records.plan import PlannedSample, shard_id
from storage.store import Store

SAMPLES_PER_SHARD = 100
TOKENS_PER_SAMPLE = 160
NEWER = 500
SIZES = (10_000, 100_000, 1_000_000)
MEASURE = """
import json, sys, time
from pathlib import Path
from benchmarks import many_shards
from storage.store import Store
def peak_bytes():  # getrusage's maximum includes the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak_bytes()
begun = time.perf_counter()
store = Store.open(sys.argv[2])
found = many_shards.work(sys.argv[1], store, int(sys.argv[3]))
print(json.dumps([found, time.perf_counter() - begun, peak_bytes(), before]))
"""
REPORT = """\
# Stores of many shards

`python -m benchmarks.many_shards`: {machine};
one run per size, each step in a separate process, files in the page cache.

{samples} samples of {tokens} tokens in each shard, {newer} of the shards in single records, the
others in manifests. `open` reads all shard ids, the expected objects of each, and the totals.
`plan` takes all samples of the store and 1 % more, plans the missing ones and writes the plan.

| shards | samples | manifests | open, s | peak, MB | plan, s | peak, MB | shards planned |
|---|---|---|---|---|---|---|---|
{rows}

Peak memory includes {before:.0f} MB for imports.
"""


def identity() -> StoreIdentity:
    """Return the identity of the synthetic stores."""
    return StoreIdentity(
        target_fingerprint="f" * 64,
        target_fields={},
        tokenizer_fingerprint="t" * 64,
        template_fingerprint="c" * 64,
        aux_layers=(1, 15, 28),
        hidden_size=4096,
        vocab_size=128_256,
        norm_convention="post_norm",
        profile="lossless",
    )


def records(first: int, stop: int) -> Iterator[CommitRecord]:
    """Yield the commit records of shards `first` to `stop`; always the same for a shard."""
    identity_id = identity().identity_id
    for number in range(first, stop):
        names = sample_names(number)
        yield CommitRecord(
            shard_id=shard_id(names),
            identity_id=identity_id,
            sample_ids=names,
            sample_tokens=(TOKENS_PER_SAMPLE,) * SAMPLES_PER_SHARD,
            sample_supervised=(number % TOKENS_PER_SAMPLE,) * SAMPLES_PER_SHARD,
            raw_bytes=SAMPLES_PER_SHARD * TOKENS_PER_SAMPLE * 4 * 4096 * 2,
            objects={f"{number:016x}.zarr.zip": ObjectDigest(num_bytes=number, xxh3_128=names[0])},
            probe=(),
        )


def sample_names(number: int) -> tuple[str, ...]:
    """Return the ids of the samples of one shard."""
    digits = np.random.default_rng(number).bytes(16 * SAMPLES_PER_SHARD).hex()
    return tuple(digits[at : at + 32] for at in range(0, len(digits), 32))


def make_store(root: Path, num_shards: int) -> None:
    """Write manifests for all shards but the newest, and single records for these."""
    store = Store.create(str(root), identity())
    for first in range(0, num_shards - NEWER, MOST_SHARDS):
        stop = min(first + MOST_SHARDS, num_shards - NEWER)
        Manifest.write(
            store.root, list(records(first, stop)), identity_id=store.identity.identity_id
        )
    for record in records(num_shards - NEWER, num_shards):
        store.log.create(record)


def work(step: str, store: Store, num_shards: int) -> int:
    """Run the measured step and return the number of shards."""
    if step == "open":
        commits = store.commits()
        totals = commits.totals
        assert totals.num_samples == num_shards * SAMPLES_PER_SHARD
        names = store.shard_ids()
        assert commits.objects(names[0])
        return len(names)
    more = num_shards + num_shards // 100
    samples = (
        PlannedSample(sample_id=name, num_tokens=TOKENS_PER_SAMPLE)
        for number in range(more)
        for name in sample_names(number)
    )
    return len(store.plan(samples, shard_tokens=SAMPLES_PER_SHARD * TOKENS_PER_SAMPLE).shards)


def measure(step: str, root: Path, num_shards: int) -> tuple[int, float, float, float]:
    """Return shards, seconds, and MB of memory at the peak and before the step."""
    found, seconds, peak, before = json.loads(
        subprocess.check_output([sys.executable, "-c", MEASURE, step, str(root), str(num_shards)])
    )
    return found, seconds, peak / 1e6, before / 1e6


def main() -> None:
    """Print the results and write them to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="*", default=SIZES)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--folder", type=Path, help="for the stores, 5 GB; default: temporary")
    arguments = parser.parse_args()
    rows: list[str] = []
    before = 0.0
    for num_shards in arguments.shards:
        root = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            begun = time.perf_counter()
            make_store(root, num_shards)
            print(
                f"{num_shards:,} shards written in {time.perf_counter() - begun:.0f} s", flush=True
            )
            opened, open_seconds, open_peak, before = measure("open", root, num_shards)
            planned, plan_seconds, plan_peak, _ = measure("plan", root, num_shards)
            manifests = len(Store.open(str(root)).log.manifests())
        finally:
            shutil.rmtree(root)
        rows.append(
            f"| {opened:,} | {opened * SAMPLES_PER_SHARD:,} | {manifests} | {open_seconds:.2f} | "
            f"{open_peak:.0f} | {plan_seconds:.1f} | {plan_peak:.0f} | {planned:,} |"
        )
        print(rows[-1], flush=True)
    report = REPORT.format(
        machine=describe(("pyarrow", "numpy")),
        samples=SAMPLES_PER_SHARD,
        tokens=TOKENS_PER_SAMPLE,
        newer=NEWER,
        rows="\n".join(rows),
        before=before,
    )
    Console().print(report, markup=False, highlight=False, soft_wrap=True)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
