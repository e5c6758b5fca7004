"""The store against other tools' formats on real hidden states, all in one run, taking turns.

`python -m benchmarks.store smollm2 --results docs/benchmarks/store.md`

runs the target of the recipe over conversations that `make demo` (or a hidden-states flow) left in
the home folder, writes and reads the states in each format, and prints two tables:

* formats: bytes on disk per real token, MB of real bfloat16 states per second (CPU time of this
  process, and wall), samples per second, files per 1000 conversations. Padding and repeated rows of
  other tools' formats count against them: they are stored and read, but nothing is learned twice.
* profiles: codec speed alone, error, and the teacher's divergence (KL, nats) from the true states.

Values are medians of the rounds. Reads are from the page cache: disks differ more than processors.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.peer_formats import BATCH_SAMPLES, PEERS, padded_tokens, turn_ends
from benchmarks.states import capture, identity, load_target, token_file
from flows.config.store import StoreConfig
from flows.reports.cost import encoding_name
from flows.workspace import DEFAULT_HOME
from storage.bfloat16 import bf16_to_float
from storage.encoding.state_rows import StateRows
from storage.encoding.states import decode_states, write_states
from storage.encoding.zarr_arrays import load_arrays
from storage.objects.buffer_pool import RecycledMemory
from storage.profiles import PROFILES, ProfileName
from storage.records.plan import PlannedSample
from storage.samples import StoredSample, last_needed
from storage.store import Store
from tests.storage.synthetic import ObjectsInMemory

FORMAT_HEAD = (
    "| format | bytes/token | write MB/s CPU, wall | read MB/s CPU, wall | read samples/s | "
    "files/1000 |"
)
PROFILE_HEAD = (
    "| profile | stored/raw | encode MB/CPU-s | decode MB/CPU-s | relative error | "
    "teacher KL, nats |"
)
REPORT = """\
# The store against other tools' formats

`{command}`: {machine}; median of {rounds}.

{num_samples} conversations, {tokens:,} tokens, hidden size {hidden}, {layers} aux layers.
One row per assistant turn gives {rows} rows of {row_tokens:,} tokens of the same text; padding to
the longest of {batch} gives {padded_tokens:,}. MB are of the bfloat16 states of real tokens, the
same for all formats. Values of Eyas include health checks, digests, fsync and the snapshot; others
have none of these. "+ recompute" stores half of the states; the cost of recomputing the others is
in recompute.md.

{formats}

The states alone, encoded in memory. Tokens without a supervised token near them have no last state;
"raw" counts only the stored states.

{profiles}
"""
PACKAGES = ("zarr", "numcodecs", "zstandard", "numpy", "torch", "safetensors")
KL_POSITIONS = 2000
HALVED: Sequence[ProfileName] = ("lossless", "int8")
"""Profiles that are also measured with omitted states; recomputing these is not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One write and one read of all samples in one format."""

    stored_bytes: float
    num_files: float
    write_wall: float
    """Seconds."""
    write_cpu: float
    read_wall: float
    read_cpu: float


Clock = tuple[float, float]


def _now() -> Clock:
    return time.perf_counter(), time.process_time()


def take_turn(write: Callable[[Path], None], read: Callable[[Path], int], *, expected: int) -> Turn:
    """Write to a fresh folder and read it back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = _now()
        write(folder)
        written = _now()
        items = read(folder)
        done = _now()
        if items < expected:
            raise RuntimeError(f"read {items} of {expected} samples")
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Turn(
        stored_bytes=sum(sizes),
        num_files=len(sizes),
        write_wall=written[0] - begun[0],
        write_cpu=written[1] - begun[1],
        read_wall=done[0] - written[0],
        read_cpu=done[1] - written[1],
    )


def _write_store(
    profile: ProfileName,
    samples: Sequence[StoredSample],
    vocab: int,
    folder: Path,
    *,
    recompute: bool,
) -> None:
    about = identity(samples[0], vocab_size=vocab, profile=profile, recompute=recompute)
    store = Store.create(str(folder), about)
    by_id = {sample.sample_id: sample for sample in samples}
    planned = [PlannedSample(sample_id=s.sample_id, num_tokens=len(s)) for s in samples]
    for shard in store.plan(planned, shard_tokens=StoreConfig().shard_tokens).shards:
        store.write_shard(shard, [by_id[sample_id] for sample_id in shard.sample_ids])
    store.publish(by_id)


def _read_store(folder: Path) -> int:
    store = Store.open(str(folder))
    reader = store.reader(store.snapshot())
    for index in range(len(reader)):
        reader.fetch(index)
    return len(reader)


def measure_formats(
    samples: Sequence[StoredSample], *, vocab: int, rounds: int
) -> Mapping[str, Turn]:
    """Return the median turn of every format; formats take turns within each round."""
    formats: dict[str, Callable[[], Turn]] = {
        encoding_name(
            f"Eyas {profile}", recompute=recompute
        ): lambda profile=profile, recompute=recompute: take_turn(  # type: ignore[misc]
            lambda folder: _write_store(profile, samples, vocab, folder, recompute=recompute),
            _read_store,
            expected=len(samples),
        )
        for profile, recompute in [*((p, False) for p in PROFILES), *((p, True) for p in HALVED)]
    }
    for peer in PEERS:
        formats[peer.name] = lambda peer=peer: take_turn(  # type: ignore[misc]
            lambda folder: peer.write(samples, folder), peer.read, expected=len(samples)
        )
    turns: dict[str, list[Turn]] = {name: [] for name in formats}
    for turn in range(rounds + 1):
        for name, take in formats.items():
            found = take()
            if turn:  # the first round pays for imports
                turns[name].append(found)
    return {name: _median(found) for name, found in turns.items()}


def _median(turns: Sequence[Turn]) -> Turn:
    values = {
        field.name: statistics.median(getattr(turn, field.name) for turn in turns)
        for field in fields(Turn)
    }
    return Turn(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileFigures:
    """Size, speed and error of a profile on the states alone."""

    ratio: float
    """Stored bytes / raw bytes."""
    encode: float
    """Raw MB per CPU-second."""
    decode: float
    error: float
    """Root mean square error relative to the channel's own spread, over all states."""
    teacher_kl: float
    """Mean nats over random supervised positions, full vocabulary."""


def _discard(_key: str) -> "_Nowhere":
    return _Nowhere()


class _Nowhere:
    def __enter__(self) -> Callable[[bytes], object]:
        return len

    def __exit__(self, *_: object) -> None:
        pass


def measure_profile(
    profile: ProfileName, samples: Sequence[StoredSample], head: NDArray[np.float32], *, rounds: int
) -> ProfileFigures:
    """Encode and decode the stored states of all samples in memory."""
    aux = StateRows([sample.aux_hidden_states for sample in samples])
    last = StateRows([s.last_hidden_state[last_needed(s.loss_mask)] for s in samples])
    raw_bytes = 2 * (np.prod(aux.shape) + np.prod(last.shape))
    objects = ObjectsInMemory()
    for name, rows in (("aux", aux), ("last", last)):
        write_states(name, rows, profile, objects.open)
    encode, decode = [], []
    found: dict[str, NDArray[np.uint16]] = {}
    memory = RecycledMemory(most_free=2)  # a reader decodes into this
    for _ in range(rounds):
        found.clear()
        begun = time.process_time()
        for name, rows in (("aux", aux), ("last", last)):
            write_states(name, rows, profile, _discard)
        encoded = time.process_time()
        arrays = load_arrays(objects.written, what="benchmark")
        for name in ("aux", "last"):
            found[name] = decode_states(name, arrays, profile, memory.empty)
        encode.append(encoded - begun)
        decode.append(time.process_time() - encoded)
    return ProfileFigures(
        ratio=sum(map(len, objects.written.values())) / raw_bytes,
        encode=raw_bytes / 1e6 / statistics.median(encode),
        decode=raw_bytes / 1e6 / statistics.median(decode),
        error=_relative_error(aux.every(1), found["aux"]),
        teacher_kl=teacher_kl(last.every(1), found["last"], head),
    )


def _relative_error(expected: NDArray[np.uint16], found: NDArray[np.uint16]) -> float:
    true = bf16_to_float(expected).astype(np.float64)
    error = np.sqrt(np.square(bf16_to_float(found) - true).mean(axis=0))
    return float((error / np.maximum(true.std(axis=0), 1e-30)).mean())


def teacher_kl(
    expected: NDArray[np.uint16], found: NDArray[np.uint16], head: NDArray[np.float32]
) -> float:
    """Return mean nats over random rows [R, H] of last states, full vocabulary."""
    rows = np.random.default_rng(0).choice(
        len(expected), min(KL_POSITIONS, len(expected)), replace=False
    )
    total = 0.0
    for part in np.array_split(rows, max(1, len(rows) // 250)):
        true, coded = (_log_softmax(bf16_to_float(x[part]) @ head.T) for x in (expected, found))
        total += float((np.exp(true) * (true - coded)).sum())
    return total / len(rows)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


def format_table(turns: Mapping[str, Turn], samples: Sequence[StoredSample]) -> Iterator[str]:
    """Yield the rows of the formats' table in Markdown."""
    tokens = sum(len(sample) for sample in samples)
    states = ("aux_hidden_states", "last_hidden_state")
    megabytes = sum(getattr(s, name).nbytes for s in samples for name in states) / 1e6
    yield FORMAT_HEAD
    yield "|---|---|---|---|---|---|"
    for name, turn in turns.items():
        yield (
            f"| {name} | {turn.stored_bytes / tokens:,.0f} | {megabytes / turn.write_cpu:.0f}, "
            f"{megabytes / turn.write_wall:.0f} | {megabytes / turn.read_cpu:.0f}, "
            f"{megabytes / turn.read_wall:.0f} | {len(samples) / turn.read_wall:.0f} | "
            f"{turn.num_files / len(samples) * 1000:,.0f} |"
        )


def profile_table(measured: Mapping[ProfileName, ProfileFigures]) -> Iterator[str]:
    """Yield the rows of the profiles' table in Markdown."""
    yield PROFILE_HEAD
    yield "|---|---|---|---|---|---|"
    for name, found in measured.items():
        yield (
            f"| `{name}` | {found.ratio:.3f} | {found.encode:.0f} | {found.decode:.0f} | "
            f"{found.error:.1e} | {found.teacher_kl:.1e} |"
        )


def report(arguments: argparse.Namespace) -> str:
    """Measure everything and return the report in Markdown."""
    target = load_target(arguments.recipe)
    head = target.lm_head_weight.float().numpy()
    samples = capture(target, token_file(arguments.recipe, arguments.home), arguments.samples)
    turns = measure_formats(samples, vocab=len(head), rounds=arguments.rounds)
    profiles = {p: measure_profile(p, samples, head, rounds=arguments.rounds) for p in PROFILES}
    ends = [turn_ends(sample) for sample in samples]
    layers, hidden = samples[0].aux_hidden_states.shape[1:]
    return REPORT.format(
        command=f"python -m benchmarks.store {arguments.recipe} --samples {arguments.samples}",
        machine=describe(PACKAGES),
        rounds=arguments.rounds,
        num_samples=len(samples),
        tokens=sum(len(sample) for sample in samples),
        hidden=hidden,
        layers=layers,
        rows=sum(len(turns) for turns in ends),
        row_tokens=sum(int(turns.sum()) for turns in ends),
        batch=BATCH_SAMPLES,
        padded_tokens=padded_tokens(samples),
        formats="\n".join(format_table(turns, samples)),
        profiles="\n".join(profile_table(profiles)),
    )


def main() -> None:
    """Print the report and write it to `--results`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--home", type=Path, default=Path(DEFAULT_HOME))
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found = report(arguments)
    Console().print(found, markup=False, soft_wrap=True, highlight=False)
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
