"""Which snapshot a run learns from: its own once it has begun, else that of its data set."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eagle_core import checkpoint
from eagle_core.dataset_config import DatasetConfig
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.schedule import total_steps
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from eagle_core.training_config import TrainingConfig
from flows.prepare import known_tokens, prepare, tokens_of_run
from flows.run_file import Run, own_tokens, read_run
from flows.summaries import TokensSummary
from flows.workspace import Workspace
from storage.errors import StorageError
from storage.snapshot import Snapshot
from storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """A snapshot without a held-out sample, and the tokens that it was made from."""

    snapshot: Snapshot
    tokens: TokensSummary
    begun: Run | None = None
    """What the run was made with, if it has begun and wrote that down."""


def training_data(
    store: Store,
    target: TargetConfig,
    dataset: DatasetConfig,
    training: TrainingConfig,
    space: Workspace,
    run_path: Path,
    *,
    snapshot_id: str | None,
) -> TrainingData:
    """Return what a run is to learn from.

    A run that has begun goes on with its own snapshot, and reads no data set. A new one takes the
    snapshot that is asked for, or else that of the data set as it is now, which is published if it
    is not there yet.

    Raises:
        ConfigError: states are missing from the store; says how many.
        MismatchError: the snapshot is of other data, has held-out samples, or is not the run's.

    """
    content = own_tokens(run_path)
    if content is not None:
        data = _own(store, target, dataset, space, run_path, content, wanted=snapshot_id)
        _compare_with_now(store, data.snapshot, training, space, run_path)
    elif snapshot_id is not None:
        data = _asked_for(store, target, dataset, space, snapshot_id)
    else:
        data = _of_the_data_set(store, target, dataset, space)
    held_out = _members(data.tokens.held_out_path)
    num_held_out = len(held_out & data.snapshot.members)
    if num_held_out:
        raise MismatchError(
            f"snapshot {data.snapshot.snapshot_id} of {store.root.url} has {num_held_out:,} of the "
            f"{len(held_out):,} samples that data set {dataset.name} holds out: what is measured "
            "on must not be learned from. Run hidden-states with this recipe, then train another "
            "run"
        )
    return data


@contextmanager
def held_by_run(store: Store, title: str, snapshot_id: str) -> Iterator[None]:
    """Keep garbage collection from a run's snapshot until the block ends without an error."""
    try:
        store.refs.hold(title, snapshot_id)
    except StorageError as error:
        logger.warning("until run %s has ended, collect no garbage (`gc`): %s", title, error)
    yield
    try:
        store.refs.release(title, snapshot_id)
    except StorageError as error:
        logger.warning("`gc` goes on keeping the snapshot of run %s: %s", title, error)


def _own(
    store: Store,
    target: TargetConfig,
    dataset: DatasetConfig,
    space: Workspace,
    run_path: Path,
    content: str,
    *,
    wanted: str | None,
) -> TrainingData:
    folder = checkpoint.newest(run_path)
    assert folder is not None  # noqa: S101 (it has tokens of its own)
    snapshot_id = checkpoint.read(folder).loader.source_id
    if wanted not in {None, snapshot_id}:
        raise MismatchError(
            f"run {run_path.name} learns from snapshot {snapshot_id}, not from {wanted}; train "
            "another run (--run)"
        )
    if snapshot_id not in store.snapshot_ids():
        raise MismatchError(
            f"run {run_path.name} learns from snapshot {snapshot_id}, which {store.root.url} does "
            f"not have; it has: {', '.join(store.snapshot_ids()) or 'none'}. Restore it, or train "
            "another run (--run)"
        )
    run = read_run(run_path)
    if run is not None and run.dataset != dataset:
        own, now = run.dataset.model_dump(), dataset.model_dump()
        changed = ", ".join(
            f"{name}: {own[name]!r} there, {now[name]!r} in the recipe"
            for name in now
            if own[name] != now[name]
        )
        logger.warning("run %s keeps its data set settings (%s)", run_path.name, changed)
    dataset = dataset if run is None else run.dataset
    tokens = tokens_of_run(target, dataset, space, run_path.name, content)
    return TrainingData(snapshot=store.snapshot(snapshot_id), tokens=tokens, begun=run)


def _compare_with_now(
    store: Store, own: Snapshot, training: TrainingConfig, space: Workspace, run_path: Path
) -> None:
    """Say that a data set has newer data than a run; refuse where that must be what was meant."""
    now = store.refs.get(space.snapshot_name("train"))
    if now is None or now == own.snapshot_id or now not in store.snapshot_ids():
        return
    newer = store.snapshot(now)
    what = (
        f"run {run_path.name} learns from snapshot {own.snapshot_id} ({own.num_samples:,} samples)"
        f", and data set {space.dataset} is snapshot {now} ({newer.num_samples:,}) by now"
    )
    if len(newer.members & own.members) <= own.num_samples / 2:
        raise MismatchError(
            f"{what}, which has few of them: it was replaced, not added to. Train another run "
            "(--run), or delete this one's folder to begin again"
        )
    folder = checkpoint.newest(run_path)
    total = total_steps(training, own.lengths, own.groups, world_size=training.num_processes)
    if folder is not None and checkpoint.read(folder).step >= total:
        raise MismatchError(
            f"{what}; it has done its {total:,} steps. To learn from the newer data train another "
            "run (--run), which may begin where this one ended (training.start_from)"
        )
    logger.warning("%s; it goes on with its own", what)


def _asked_for(
    store: Store, target: TargetConfig, dataset: DatasetConfig, space: Workspace, snapshot_id: str
) -> TrainingData:
    """Return a snapshot with the tokens that it was made from, of which none need be the newest."""
    snapshot = store.snapshot(snapshot_id)
    files = space.tokens_path.glob("train-*.arrow")
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if _members(path) == snapshot.members:
            tokens = known_tokens(target, space, path.stem.removeprefix("train-"))
            if tokens is not None:
                return TrainingData(snapshot=snapshot, tokens=tokens)
    tokens = prepare(target, dataset, str(space.home))[1]
    num_shared = len(_members(tokens.train_path) & snapshot.members)
    num_held_out = len(_members(tokens.held_out_path) & snapshot.members)
    if num_shared < snapshot.num_samples:
        raise MismatchError(
            f"of the {snapshot.num_samples:,} samples in snapshot {snapshot_id} of "
            f"{store.root.url}, data set {dataset.name} as it is now has {num_shared:,} for "
            f"training and holds out {num_held_out:,}, and no tokens of an earlier version of it "
            "are here; choose another snapshot (`eyas inspect` lists them), or the recipe that "
            "made it"
        )
    return TrainingData(snapshot=snapshot, tokens=tokens)


def _of_the_data_set(
    store: Store, target: TargetConfig, dataset: DatasetConfig, space: Workspace
) -> TrainingData:
    tokens = prepare(target, dataset, str(space.home))[1]
    train = TokenFile(tokens.train_path).sample_ids
    commits = store.commits()
    committed = {name for record in commits.values() for name in record.sample_ids}
    wanted = {*train, *TokenFile(tokens.held_out_path).sample_ids}
    num_there = len(wanted & committed)
    if num_there < len(wanted):
        raise ConfigError(
            f"the store at {store.root.url} holds {num_there:,} of {len(wanted):,} samples of data "
            f"set {dataset.name}; run hidden-states with this recipe{_or_else(store, space)}"
        )
    snapshot = Snapshot.of(train, commits)
    if snapshot.snapshot_id not in store.snapshot_ids():
        store.publish(train, commits=commits, as_latest=False)
    return TrainingData(snapshot=snapshot, tokens=tokens)


def _or_else(store: Store, space: Workspace) -> str:
    earlier = store.refs.get(space.snapshot_name("train"))
    if earlier is None:
        return ""
    return f", or train on what it was when that ran last (--snapshot {earlier})"


def _members(path: Path) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(name) for name in TokenFile(path).sample_ids)
