"""A thousand SIGKILLs at random moments of generation, publishing, training and collection.

`python -m benchmarks.sigkills --results docs/benchmarks/sigkills.md` runs a small pipeline (see
`tests/killed_pipeline.py`) repeatedly and kills it several times per life. After each kill: all
committed shards are still there, with the same bytes; every byte of every shard matches its record;
every visible snapshot, name and checkpoint is complete. At the end of each life: the shards,
snapshots, names and the weights of both runs are bit-identical to those of an undisturbed life, and
after a garbage collection no unreferenced file is left.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefect.testing.utilities import prefect_test_harness
from rich.console import Console

from benchmarks.machine import describe
from eagle_core.atomic_files import file_digest
from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from eagle_core.training.checkpoint import newest
from flows.bridge.store_identity import store_identity
from flows.config.store import StoreConfig
from flows.tasks.prepare import prepare
from storage.errors import ConfigError
from storage.maintenance.gc import find_garbage
from storage.maintenance.verify import verify_store
from storage.records import keys
from storage.records.commit_record import CommitRecord
from storage.store import Store
from tests import killed_pipeline, tiny

CONVERSATIONS, MORE = 24, 8
KILLS_PER_LIFE = 5
REPORT = """\
# SIGKILLs

`python -m benchmarks.sigkills`: {machine}.

{kills:,} kills in {lives} lives of the pipeline; an undisturbed life takes {seconds:.1f} s. The
last stage that had started when a kill came:

| stage | kills |
|---|---|
{rows}

No committed shard was lost, nothing visible was incomplete, and every life ended bit-identical to
the undisturbed one: {num_shards} shards, {num_snapshots} snapshot, the weights of two runs.
"""
STAGES = (
    "creation of the store",
    "states and snapshot of the first data set",
    "training of the first run",
    "more states, the next snapshot, garbage collection, resuming the first run",
    "training of the second run, garbage collection",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """The state of a life of the pipeline."""

    committed: Mapping[str, CommitRecord] = field(default_factory=dict)
    """Without the names of attempts, which differ between lives."""
    snapshots: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    """Digest of the newest checkpoint's weights, by run."""

    @classmethod
    def of(cls, folder: Path, *, before: "State | None" = None) -> "State":
        """Inspect a life that was killed, or has ended, and require that all of it is sound.

        Raises:
            RuntimeError: something was lost, or is visible but incomplete.

        """
        committed_before = before.committed if before else {}
        try:
            store = Store.open(str(folder / "store"))
        except ConfigError:  # killed before it had created the store
            _require(not committed_before, "the store is gone")
            return cls()
        committed = {name: _without_attempt(record) for name, record in store.commits().items()}
        lost = [key for key in committed_before if committed.get(key) != committed_before[key]]
        _require(not lost, f"committed shards were lost or changed: {lost}")
        damaged = [f for f in verify_store(store, deep=True) if f.object_key != keys.LATEST]
        _require(not damaged, f"visible objects are damaged: {damaged}")
        runs = sorted(path for path in (folder / "runs").glob("*") if path.is_dir())
        return cls(
            committed=committed,
            snapshots=tuple(store.snapshot_ids()),
            names=dict(store.refs.names()),
            weights={run.name: _newest_weights(run) for run in runs},
        )


def stage_of(folder: Path) -> str:
    """Return the last stage that has started."""
    runs = folder / "runs"
    begun = [
        (folder / "store" / "store.json").exists(),
        (runs / "first").exists(),
        (folder / "grown").exists(),
        (runs / "second").exists(),
    ]
    return STAGES[sum(begun)]


def settings_for(folder: Path, target_path: Path) -> killed_pipeline.Settings:
    """Return the settings of lives, for two versions of a data set; needs a Prefect server."""
    folder.mkdir(parents=True)
    target = TargetConfig(
        name="tiny", model=str(target_path), dtype="float32", device="cpu", batch_tokens=512
    )
    files: list[Path] = []
    for name, count in (("first", CONVERSATIONS), ("grown", CONVERSATIONS + MORE)):
        source = tiny.write_conversations(folder / f"{name}.json", count)
        dataset = DatasetConfig(
            name=name, source=str(source), held_out_fraction=0.0, max_length=256
        )
        tokens = prepare(target, dataset, str(folder / "home"))[1]
        files.append(tokens.train_path)
    identity = store_identity(target, StoreConfig(recompute=False), tokens)
    return killed_pipeline.Settings(
        target=target, identity=identity.to_json().decode(), token_files=(files[0], files[1])
    )


def main() -> None:
    """Print the results and write them to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="eyas-sigkills-"))
    try:
        with prefect_test_harness(server_startup_timeout=300):
            settings = settings_for(folder / "data", tiny.write_target(folder / "target"))
        report = kill_often(settings, folder, kills=arguments.kills, seed=arguments.seed)
    finally:
        shutil.rmtree(folder)
    Console().print(report, markup=False, highlight=False, soft_wrap=True)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


def kill_often(settings: killed_pipeline.Settings, folder: Path, *, kills: int, seed: int) -> str:
    """Start, kill and finish lives until there are enough kills; return the report."""
    rng = random.Random(seed)  # noqa: S311 (no secret)
    counts = dict.fromkeys(STAGES, 0)
    lives_ended = 0
    with killed_pipeline.started(settings) as lives:
        lives.live(folder / "first")
        began = time.monotonic()
        lives.live(folder / "undisturbed")
        seconds = time.monotonic() - began
        expected = State.of(folder / "undisturbed")
        while sum(counts.values()) < kills:
            here, state = folder / "killed", State()
            while lives.live(here, seconds=rng.uniform(0, 2 * seconds / KILLS_PER_LIFE)):
                counts[stage_of(here)] += 1
                state = State.of(here, before=state)
                if sum(counts.values()) >= kills:
                    lives.live(here)
                    break
            _require(State.of(here, before=state) == expected, "a life ended in another state")
            left = find_garbage(
                Store.open(str(here / "store")), keep=expected.snapshots, older_than_hours=0
            )
            _require(not left, f"a life left garbage: {left}")
            lives_ended += 1
            shutil.rmtree(here)
    return REPORT.format(
        machine=describe(("torch", "zarr", "pyarrow")),
        kills=sum(counts.values()),
        lives=lives_ended,
        seconds=seconds,
        rows="\n".join(f"| {stage} | {count} |" for stage, count in counts.items()),
        num_shards=len(expected.committed),
        num_snapshots=len(expected.snapshots),
    )


def _newest_weights(run_path: Path) -> str:
    """Return the digest of the newest checkpoint's weights; it must be the newest visible one."""
    shown = sorted((run_path / "checkpoints").glob("step-*"))
    found = newest(run_path)
    _require(
        found == (shown[-1] if shown else None),
        f"the newest visible checkpoint in {run_path} is damaged",
    )
    return file_digest(found / "draft.safetensors") if found else ""


def _without_attempt(record: CommitRecord) -> CommitRecord:
    (digest,) = record.objects.values()
    return replace(record, objects={"data": digest})


def _require(is_so: bool, problem: str) -> None:
    if not is_so:
        raise RuntimeError(problem)


if __name__ == "__main__":
    main()
