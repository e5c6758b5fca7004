"""Bytes and speed of the profiles on hidden states: `python -m benchmarks.store STATES.npz`.

`STATES.npz` holds `aux` [T, A, H] and `last` [T, H] as bfloat16 bits in uint16. Profiles take turns
within one run; figures are medians, per second of wall time and of CPU time of this process.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from storage.identity import PROFILES, StoreIdentity
from storage.plan import PlannedSample
from storage.samples import StoredSample, content_id
from storage.store import Store

SAMPLE_TOKENS = 512
PROMPT_TOKENS = 180
VOCAB_SIZE = 49152


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One write and one read of all samples."""

    ratio: float
    """Stored bytes, of everything, to raw bytes."""
    bytes_per_token: float
    write_cpu: float
    """Raw MB per CPU-second."""
    write_wall: float
    read_cpu: float
    read_wall: float


def make_samples(aux: NDArray[np.uint16], last: NDArray[np.uint16]) -> list[StoredSample]:
    """Cut states into samples with a prompt and an answer each."""
    rng = np.random.default_rng(0)
    mask = np.arange(SAMPLE_TOKENS) >= PROMPT_TOKENS
    samples = []
    for first in range(0, len(aux) - SAMPLE_TOKENS + 1, SAMPLE_TOKENS):
        rows = slice(first, first + SAMPLE_TOKENS)
        ids = rng.integers(0, VOCAB_SIZE, SAMPLE_TOKENS, dtype=np.int32)
        samples.append(
            StoredSample(
                sample_id=content_id(ids, mask),
                input_ids=ids,
                loss_mask=mask,
                aux_hidden_states=aux[rows],
                last_hidden_state=last[rows],
                target_argmax=ids,
                target_logsumexp=rng.normal(20, 1, SAMPLE_TOKENS).astype(np.float32),
            )
        )
    return samples


def measure(profile: str, samples: Sequence[StoredSample]) -> Measurement:
    """Write and read all samples once, as one shard in a fresh store."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(folder, _identity(profile, samples[0]))
        planned = [PlannedSample(sample_id=s.sample_id, num_tokens=len(s)) for s in samples]
        (shard,) = store.plan(planned, shard_tokens=10**9).shards
        started = time.perf_counter(), time.process_time()
        record = store.write_shard(shard, samples)
        wrote = time.perf_counter(), time.process_time()
        reader = store.reader(store.publish(shard.sample_ids))
        opened = time.perf_counter(), time.process_time()
        for index in range(len(reader)):
            reader.fetch(index)
        read = time.perf_counter(), time.process_time()
    megabytes = record.raw_bytes / 1e6
    return Measurement(
        ratio=record.stored_bytes / record.raw_bytes,
        bytes_per_token=record.stored_bytes / record.num_tokens,
        write_wall=megabytes / (wrote[0] - started[0]),
        write_cpu=megabytes / (wrote[1] - started[1]),
        read_wall=megabytes / (read[0] - opened[0]),
        read_cpu=megabytes / (read[1] - opened[1]),
    )


def _identity(profile: str, sample: StoredSample) -> StoreIdentity:
    layers, hidden = sample.aux_hidden_states.shape[1:]
    return StoreIdentity(
        target_fingerprint="benchmark",
        target_fields={},
        tokenizer_fingerprint="benchmark",
        template_fingerprint="benchmark",
        aux_layers=tuple(range(layers)),
        hidden_size=hidden,
        vocab_size=VOCAB_SIZE,
        norm_convention="post_norm",
        profile=profile,
    )


def main() -> None:
    """Print one table row for each profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("states", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with np.load(arguments.states, allow_pickle=False) as states:
        samples = make_samples(states["aux"], states["last"])
    for profile in PROFILES:
        measure(profile, samples)  # the first call pays for imports
    rounds = [{p: measure(p, samples) for p in PROFILES} for _ in range(arguments.rounds)]
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"zarr {zarr.__version__}, numpy {np.__version__}, median of {arguments.rounds}"
    )
    print("| profile | stored/raw | bytes/token | write MB/s cpu, wall | read MB/s cpu, wall |")
    print("|---|---|---|---|---|")
    for profile in PROFILES:
        runs = [found[profile] for found in rounds]
        w_cpu, w_wall, r_cpu, r_wall = (
            statistics.median(getattr(run, name) for run in runs)
            for name in ("write_cpu", "write_wall", "read_cpu", "read_wall")
        )
        first = runs[0]
        print(
            f"| {profile} | {first.ratio:.4f} | {first.bytes_per_token:.0f} | {w_cpu:.0f}, "
            f"{w_wall:.0f} | {r_cpu:.0f}, {r_wall:.0f} |"
        )


if __name__ == "__main__":
    main()
