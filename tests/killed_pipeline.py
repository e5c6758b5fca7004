"""A small pipeline that may be killed at any moment: states, snapshots, two runs, garbage.

`python -m tests.killed_pipeline SETTINGS` imports once and then forks a process for each line of
its standard input, which names a folder and for how many seconds to let it live. No Prefect is in
it: only what writes to a store and to the folder of a run. A life goes on where the one before
ended:

1. states of the first data, its snapshot by name, 4 steps of run `first`;
2. the data grows: states of what is new, the snapshot, garbage collected; `first` goes on with its
   own snapshot to 8 steps; run `second` learns from the new one; garbage collected.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from pydantic import BaseModel
from transformers.utils import logging

from eagle_core.atomic_files import atomic_file
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.tracking.tracker import NoTracker
from eagle_core.training.config import TrainingConfig
from eagle_core.training.trainer import train
from flows.bridge.draft_setup import choose_vocabulary, set_up_draft
from flows.bridge.recompute import TargetRecompute
from flows.bridge.semantic_probe import require_sound
from flows.bridge.stored_source import StoredSource
from flows.workers.shard_batch import ShardBatch
from flows.workers.shard_worker import ShardWorker
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.records.identity import StoreIdentity
from storage.records.plan import PlannedSample
from storage.store import Store

STEPS = 4
NAME = "facts-train"


class Settings(BaseModel):
    """What all lives have in common."""

    target: TargetConfig
    identity: str
    """The content of `store.json`."""
    token_files: tuple[Path, Path]
    """Of the data at first, and when it has grown."""


def live(settings: Settings, folder: Path) -> None:
    """Go on from whatever is in `folder` to the end."""
    store = Store.create(str(folder / "store"), StoreIdentity.from_json(settings.identity.encode()))
    with _once(folder / "grown") as is_first_time:
        if is_first_time:
            _make_states(settings, store, settings.token_files[0])
            _train(settings, store, folder, "first", settings.token_files[0], STEPS)
    with _once(folder / "learned") as is_first_time:
        if is_first_time:
            _make_states(settings, store, settings.token_files[1])
            _collect(store)
            _train(settings, store, folder, "first", settings.token_files[0], 2 * STEPS)
            _train(settings, store, folder, "second", settings.token_files[1], STEPS)
    store.refs.release_all("first")
    store.refs.release_all("second")
    _collect(store)


@contextmanager
def _once(marker: Path) -> Iterator[bool]:
    """Tell whether a stage has not ended yet; note that it has when the block ends."""
    if marker.exists():
        yield False
        return
    yield True
    with atomic_file(marker) as path:
        path.write_text("done", encoding="utf-8")


def _make_states(settings: Settings, store: Store, tokens: Path) -> None:
    file = TokenFile(tokens)
    wanted = [
        PlannedSample(sample_id=name, num_tokens=length)
        for name, length in zip(file.sample_ids, file.lengths.tolist(), strict=True)
    ]
    plan = store.plan(wanted, shard_tokens=256)
    missing = store.plans.missing(plan)
    if missing:
        batch = ShardBatch(
            target=settings.target,
            store_root=store.root.url,
            plan_id=plan.plan_id,
            shard_ids=tuple(shard.shard_id for shard in missing),
            token_files=(tokens,),
        )
        ShardWorker(batch).make(batch)
    store.publish(file.sample_ids, name=NAME)


def _train(
    settings: Settings, store: Store, folder: Path, run: str, tokens: Path, steps: int
) -> None:
    run_path = folder / "runs" / run
    own = run_path / "snapshot"
    if not own.exists():
        snapshot_id = store.refs.get(NAME)
        assert snapshot_id is not None
        store.refs.hold(run, snapshot_id)
        run_path.mkdir(parents=True, exist_ok=True)
        with atomic_file(own) as path:
            path.write_text(snapshot_id, encoding="utf-8")
    snapshot = store.snapshot(own.read_text(encoding="utf-8"))
    store.require_present(snapshot)
    config = TrainingConfig(
        dtype="float32",
        draft_vocab_size=300,
        ttt_length=2,
        batch_tokens=256,
        max_steps=steps,
        warmup_steps=0,
        schedule="constant",
        checkpoint_every=1,
    )
    choose_vocabulary(settings.target, config, TokenFile(tokens), run_path)
    setup = set_up_draft(settings.target, config, run_path)
    require_sound(store, snapshot, TargetRecompute(setup.target_lm_head, None))
    train(
        config=config,
        draft=setup.draft,
        target_lm_head=setup.target_lm_head,
        source=StoredSource(store.reader(snapshot), None),
        held_out=None,
        run_path=run_path,
        tracker=NoTracker(),
    )


def _collect(store: Store) -> None:
    keep = snapshots_to_keep(store, older_than_hours=0)
    collect(store, find_garbage(store, keep=keep, older_than_hours=0))


class Lives:
    """The process that forks lives."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin
        assert process.stdout
        self._orders, self._answers = process.stdin, process.stdout

    def live(self, folder: Path, *, seconds: float | None = None) -> bool:
        """Let one live to its end or for so long; tell whether it was killed."""
        self._orders.write(json.dumps([str(folder), seconds]) + "\n")
        self._orders.flush()
        exit_code = int(self._answers.readline())
        assert exit_code in (0, -signal.SIGKILL), f"a life ended with {exit_code}"
        return exit_code != 0


@contextmanager
def started(settings: Settings) -> Iterator[Lives]:
    """Start the process that forks lives; one thread each, so that a fork loses none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.killed_pipeline", settings.model_dump_json()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Lives(process)
        finally:
            process.kill()


def main() -> None:
    """Fork a life for each line of standard input."""
    settings = Settings.model_validate_json(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    # Bars of all forks share one lock, and a killed one never gives it back.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with (
        mock.patch("storage.records.compaction.COMPACT_FROM", 3),
        mock.patch("storage.records.compaction.SETTLE_SECONDS", -60.0),
        mock.patch("flows.workers.shard_worker.send"),
    ):
        with tempfile.TemporaryDirectory() as warm:
            live(settings, Path(warm))  # so that a child imports and compiles nothing more
        for line in sys.stdin:
            folder, seconds = json.loads(line)
            child = os.fork()
            if child == 0:
                os._exit(_lived(settings, Path(folder)))
            if seconds is not None:
                time.sleep(seconds)
                os.kill(child, signal.SIGKILL)  # it is not reaped yet, so the id is still its own
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _lived(settings: Settings, folder: Path) -> int:
    """Live and return the exit status; no exception may reach the loop of the parent's copy."""
    try:
        live(settings, folder)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
