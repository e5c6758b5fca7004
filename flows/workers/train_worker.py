"""One of the processes that train a draft in parallel, a rank under torchrun.

Its argument names a file with one `RankRequest` (JSON). All ranks do the same work on their share
of each step. Only the first one of each machine sends `RankLine`s, but any may report an error. Of
several machines, the first one has the job and sends it to the others.
"""

import logging
import os
import resource
import socket
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, JsonValue
from torch.distributed.elastic.multiprocessing.errors import record

from eagle_core.draft.settings import DraftSettings
from eagle_core.draft.vocabulary import Coverage
from eagle_core.errors import MismatchError
from eagle_core.samples import SampleSource
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import resolve_device
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.tracking.config import TrackedRun, TrackingConfig
from eagle_core.tracking.tracker import NoTracker, Tracker
from eagle_core.tracking.trackers import open_trackers
from eagle_core.training.checkpoint import newest
from eagle_core.training.config import TrainingConfig
from eagle_core.training.distributed import ONE_PROCESS, Processes, join_processes
from eagle_core.training.result import Progress, TrainingResult
from eagle_core.training.schedule import PlannedRun
from eagle_core.training.stop_request import stop_request
from eagle_core.training.trainer import train
from flows.bridge.draft_decoder import DraftsToDecode
from flows.bridge.draft_setup import DraftSetup, set_up_draft
from flows.bridge.first_weights import as_begun, first_weights
from flows.bridge.machines_agree import on_all_or_none, require_same_files, require_same_start
from flows.bridge.recompute import load_recompute_model
from flows.bridge.shard_memory import decoded_bytes
from flows.bridge.stored_source import StoredSource
from flows.workers.channel import channel_writer, report_errors, send
from flows.workers.decoders import open_decoder
from flows.workers.run_of_machines import RunOfMachines
from storage.objects.object_cache import ObjectCache
from storage.records.commits import Commits
from storage.records.snapshot import Snapshot
from storage.shared_shards import SharedShards
from storage.store import Store

OWN_LOGGERS = ("eagle_core", "storage", "flows")


class TrainJob(BaseModel):
    """What to train, and on which data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    draft: DraftSettings
    training: TrainingConfig
    tracking: TrackingConfig
    title: str
    """Name of the run, unique among all targets and data sets."""
    store_root: str
    snapshot_id: str
    held_out_tokens: Path
    run_path: Path
    object_cache: Path | None
    """Folder that caches objects of a remote store; None if the store is on a local disk.

    Of several machines, each has a folder below it: see `own_object_cache`.
    """
    object_cache_bytes: int
    decoding: DraftsToDecode | None = None
    """What the first rank decodes meanwhile, if anything."""
    planned: PlannedRun | None = None
    """What the run's files record of it, for a checkpoint of an earlier version."""
    coverage: Coverage = Coverage(share=0.0)
    """How much of the training tokens the draft can propose."""


class RankRequest(BaseModel):
    """What the ranks of one machine are started with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: TrainJob | None
    """None on all machines but the first."""
    run: RunOfMachines | None = None
    """None on one machine."""
    meeting_id: str = ""
    """Of this attempt; "" on one machine."""

    @property
    def known(self) -> TrainJob | RunOfMachines:
        """What is known before the machines meet."""
        found = self.job or self.run
        assert found is not None  # noqa: S101 (one of both is given)
        return found


class RankLine(BaseModel):
    """One line from the first rank of a machine: a step, a warning or the result."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    pid: int
    """The process that makes all ranks stop when it gets SIGTERM, from its first step on."""
    joined: TrainJob | None = None
    """Sent first by each of several machines, when all have met."""
    progress: Progress | None = None
    warning: str = ""
    result: TrainingResult | None = None


class Warnings(logging.Handler):
    """Passes our own warnings on to the parent, whose log users read."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        send(RankLine(pid=os.getpid(), warning=record.getMessage()))


def open_sources(
    job: TrainJob, commits: Commits | None = None, shared: SharedShards | None = None
) -> tuple[StoredSource, StoredSource | None]:
    """Return the samples to train on, and the held-out ones if there are any.

    With `commits`, the store's records are not read again. With `shared`, ranks decode different
    shards, and have them in memory once.
    """
    store = Store.open(job.store_root)
    commits = store.commits() if commits is None else commits
    objects = None
    if (folder := own_object_cache(job)) is not None:
        objects = ObjectCache(folder=folder, limit_bytes=job.object_cache_bytes)
    snapshot = store.snapshot(job.snapshot_id)
    cache_bytes = decoded_bytes(
        job.training,
        snapshot,
        shard_bytes=commits.totals.largest_raw_bytes,
        is_shared=shared is not None,
    )
    reader = store.reader(snapshot, cache_bytes=cache_bytes, object_cache=objects, shared=shared)
    recompute_model = load_recompute_model(job.target, store.identity)
    source = StoredSource(reader, recompute_model)
    held_out_ids = commits.usable(TokenFile(job.held_out_tokens).sample_ids)
    if not held_out_ids:
        return source, None
    held_out = Snapshot.of(held_out_ids, commits)
    held_out_reader = store.reader(held_out, object_cache=objects, shared=shared)
    return source, StoredSource(held_out_reader, recompute_model)


def own_object_cache(job: TrainJob) -> Path | None:
    """Return the folder where this machine, which need not have made the job, caches objects.

    Several machines share the home, but the cache relies on locks that other machines may not see.
    """
    if job.object_cache is None or job.training.nodes == 1:
        return job.object_cache
    return job.object_cache / f"machine-{socket.gethostname()}"


def tracked_run(
    title: str, run_path: Path, draft: DraftSettings, training: TrainingConfig, source_id: str
) -> TrackedRun:
    """Return the description of a run for trackers."""
    settings: dict[str, JsonValue] = {
        "draft": draft.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "source_id": source_id,
    }
    return TrackedRun(name=title, path=run_path, settings=settings)


def begin(
    setup: DraftSetup,
    source: SampleSource,
    held_out: SampleSource | None,
    training: TrainingConfig,
    tracker: Tracker,
    processes: Processes = ONE_PROCESS,
    *,
    refetch: bool = True,
) -> TrainingConfig:
    """Give the draft the run's first weights, and report what they are worth as step 0.

    Returns the settings to train with.
    """
    has_begun = newest(setup.run_path) is not None
    start = first_weights(setup, source, held_out, training, processes, refetch=refetch)
    if start is not None and not has_begun and (scalars := start.scalars()):
        tracker.log(scalars, step=0)
    return as_begun(training, setup.run_path)


def allow_open_files() -> None:
    """Raise the limit of open files to what the system allows: each shared shard takes two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@record  # torchrun's last output has the traceback of an unexpected error
def main() -> int:
    """Run one rank of the job that the argument names; return the exit status."""
    channel_writer()  # before a library prints
    allow_open_files()
    request = RankRequest.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if _speaks():
        for name in OWN_LOGGERS:
            logging.getLogger(name).addHandler(Warnings())
    shared = SharedShards.where_possible(Path(sys.argv[1]).parent / "shards")
    return report_errors(lambda: _train_joined(request, shared))


def _train_joined(request: RankRequest, shared: SharedShards | None) -> None:
    device = _own_device(request.known.target)
    timeout = timedelta(seconds=request.known.training.node_timeout_seconds)
    is_first = request.job is not None
    with join_processes(
        is_first_machine=is_first, timeout=timeout
    ) as processes:  # the draft must be gone when the block ends
        job = _job_of_all(request, processes)
        target = job.target.model_copy(update={"device": device})
        _train(job.model_copy(update={"target": target}), shared, processes)


def _job_of_all(request: RankRequest, processes: Processes) -> TrainJob:
    """Return the first machine's job, which fits this machine; checked on all of several."""
    if request.run is None:
        assert request.job is not None  # noqa: S101 (one machine has it)
        return request.job
    own_job = request.job if processes.is_first else None
    own_run = request.run if processes.is_first else None
    job = TrainJob.model_validate_json(processes.from_first("job", _json(own_job)))
    run = RunOfMachines.model_validate_json(processes.from_first("run", _json(own_run)))
    with on_all_or_none(processes, "command"):
        request.run.require_same(run)
        if processes.world_size != job.training.world_size:
            raise MismatchError(
                f"{processes.world_size} processes came, and {job.training.world_size} are "
                "expected: run the same command on all machines"
            )
    files = {f"the held-out tokens {job.held_out_tokens}": job.held_out_tokens}
    require_same_files(processes, job.run_path, files, meeting_id=request.meeting_id)
    if _speaks():
        send(RankLine(pid=os.getpid(), joined=job))
    return job


def _json(value: BaseModel | None) -> str | None:
    return None if value is None else value.model_dump_json()


def _train(job: TrainJob, shared: SharedShards | None, processes: Processes) -> None:
    is_first = processes.is_first
    with on_all_or_none(processes, "data and draft"):
        source, held_out = open_sources(job, shared=shared)
        setup = set_up_draft(job.target, job.training, job.run_path, job.draft)

    def on_progress(progress: Progress) -> None:
        if _speaks():
            send(RankLine(pid=os.getpid(), progress=progress))

    with (
        _tracker(job, is_first=is_first) as tracker,
        open_decoder(job.decoding if is_first else None, job.run_path) as decoder,
        stop_request(),  # one after the last step must not suppress the result
    ):
        training = begin(setup, source, held_out, job.training, tracker, processes)
        if processes.board is not None:
            require_same_start(processes, setup, training)
        result = train(
            config=training,
            draft=setup.draft,
            target_lm_head=setup.target_lm_head,
            source=source,
            held_out=held_out,
            run_path=job.run_path,
            tracker=tracker,
            decoder=decoder,
            planned=job.planned,
            on_progress=on_progress,
        )
        if _speaks():
            send(RankLine(pid=os.getpid(), result=result))


def _speaks() -> bool:
    """Return whether this is the first rank of its machine."""
    return os.environ["LOCAL_RANK"] == "0"


def _own_device(target: TargetConfig) -> str:
    """Return the GPU of this rank, where GPUs are used."""
    device = resolve_device(target.device)
    if device.type != "cuda":
        return str(device)
    number = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def _tracker(job: TrainJob, *, is_first: bool) -> AbstractContextManager[Tracker]:
    if not is_first:
        return nullcontext(NoTracker())
    run = tracked_run(job.title, job.run_path, job.draft, job.training, job.snapshot_id)
    return open_trackers(job.tracking, run)


if __name__ == "__main__":
    sys.exit(main())
