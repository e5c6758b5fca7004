"""Opening a large snapshot: `python -m benchmarks.snapshot` writes one, then opens it.

One million samples in ten thousand shards by default, opened in a fresh process: seconds, and peak
resident memory (Linux), with and without the imports of the store.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.machine import describe
from storage.objects.digests import ObjectDigest
from storage.records.commit_record import CommitRecord
from storage.records.commits import Commits
from storage.records.snapshot import Snapshot

OPEN = """
import json, sys, time
from pathlib import Path
from storage.records.snapshot import Snapshot
def peak_bytes():  # getrusage's maximum includes the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak_bytes()
begun = time.perf_counter()
path = Path(sys.argv[1])
snapshot = Snapshot.from_parquet(path.read_bytes(), snapshot_id=path.stem)
seconds = time.perf_counter() - begun
print(json.dumps([snapshot.num_samples, seconds, peak_bytes(), before]))
"""
REPORT = """\
# Opening a snapshot

`python -m benchmarks.snapshot`: {machine}; median of {rounds}.

{samples:,} samples in {shards:,} shards, {size:.0f} MB of Parquet: {seconds:.2f} s, peak memory
{peak:.0f} MB, of which {before:.0f} MB before it was opened.
"""


def make_snapshot(num_samples: int, num_shards: int) -> Snapshot:
    """Return a snapshot of random samples, the same number in each shard."""
    rng = np.random.default_rng(0)
    each = num_samples // num_shards
    commits: dict[str, CommitRecord] = {}
    for _ in range(num_shards):
        ids = tuple(rng.bytes(16).hex() for _ in range(each))
        shard_id = rng.bytes(16).hex()
        commits[shard_id] = CommitRecord(
            shard_id=shard_id,
            identity_id="0" * 32,
            sample_ids=ids,
            sample_tokens=tuple(rng.integers(50, 4000, each).tolist()),
            sample_supervised=tuple(rng.integers(1, 50, each).tolist()),
            raw_bytes=1,
            objects={"zarr.json": ObjectDigest(num_bytes=1, xxh3_128="0" * 32)},
            probe=(),
        )
    wanted = [name for record in commits.values() for name in record.sample_ids]
    return Snapshot.of(wanted, Commits(commits))


def main() -> None:
    """Print the results and write them to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    snapshot = make_snapshot(arguments.samples, arguments.shards)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{snapshot.snapshot_id}.parquet"
        path.write_bytes(snapshot.to_parquet())
        runs = [
            json.loads(subprocess.check_output([sys.executable, "-c", OPEN, str(path)]))
            for _ in range(arguments.rounds)
        ]
        size = path.stat().st_size
    counts, seconds, peaks, befores = zip(*runs, strict=True)
    report = REPORT.format(
        machine=describe(("pyarrow", "numpy")),
        rounds=arguments.rounds,
        samples=counts[0],
        shards=arguments.shards,
        size=size / 1e6,
        seconds=statistics.median(seconds),
        peak=statistics.median(peaks) / 1e6,
        before=statistics.median(befores) / 1e6,
    )
    Console().print(report, markup=False, highlight=False, soft_wrap=True)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
