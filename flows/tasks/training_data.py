"""Which snapshot a run learns from: its own once it has begun, else that of its data set."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from eagle_core.atomic_files import write_text
from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from eagle_core.training.schedule import total_steps
from flows.bridge.run import BegunRun, Run, begun_run
from flows.bridge.token_files import known_tokens
from flows.summaries import TokensSummary
from flows.tasks.prepare import prepare, tokens_of_run
from flows.workspace import Workspace
from storage.errors import CorruptError, StorageError
from storage.records.commits import Commits
from storage.records.snapshot import Snapshot
from storage.store import Store

ID_NAME = ".id"
"""File in the folder of a run that tells it from others of its name, on other machines."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """A snapshot without a held-out sample, and the tokens that it was made from."""

    snapshot: Snapshot
    tokens: TokensSummary
    commits: Commits
    """Of the store, read once."""
    begun: BegunRun | None = None

    @property
    def record(self) -> Run | None:
        """What the run was made with, if it has begun and wrote that down."""
        return None if self.begun is None else self.begun.record


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
    begun, commits = begun_run(run_path), store.commits()
    if begun is not None:
        data = _own(store, commits, target, dataset, space, run_path, begun, wanted=snapshot_id)
        if snapshot_id is None:
            _compare_with_now(store, data.snapshot, training, space, run_path, step=begun.step)
    elif snapshot_id is not None:
        data = _asked_for(store, commits, target, dataset, space, snapshot_id)
    else:
        data = _of_the_data_set(store, commits, target, dataset, space)
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
def held_by_run(store: Store, run_path: Path, data: TrainingData) -> Iterator[None]:
    """Keep garbage collection from what a run needs until the block ends without an error.

    That is its snapshot, and the one of its held-out samples. The run is told from others of the
    same name by an id in its folder; what it held before is let go.
    """
    run, held = _hold_name(run_path), False
    try:
        wanted = [data.snapshot.snapshot_id, *_held_out_snapshot(store, data)]
        for snapshot_id in wanted:
            store.refs.hold(run, snapshot_id)
        for name, snapshot_id in store.refs.held():
            if name == run and snapshot_id not in wanted:
                store.refs.release(run, snapshot_id)
        held = True
    except StorageError as error:
        logger.warning("until run %s has ended, collect no garbage (gc): %s", run, error)
    yield
    if held:
        try:
            store.refs.release_all(run)
        except StorageError as error:
            logger.warning("gc goes on keeping the snapshots of run %s: %s", run, error)


def _held_out_snapshot(store: Store, data: TrainingData) -> Iterator[str]:
    sample_ids = data.commits.usable(TokenFile(data.tokens.held_out_path).sample_ids)
    if sample_ids:
        snapshot = Snapshot.of(sample_ids, data.commits)
        if snapshot.snapshot_id not in store.snapshot_ids():
            store.publish(sample_ids, commits=data.commits, as_latest=False)
        yield snapshot.snapshot_id


def _hold_name(run_path: Path) -> str:
    path = run_path / ID_NAME
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:8])
    return f"{run_path.name}.{path.read_text(encoding='utf-8').strip()}"


def _own(
    store: Store,
    commits: Commits,
    target: TargetConfig,
    dataset: DatasetConfig,
    space: Workspace,
    run_path: Path,
    begun: BegunRun,
    *,
    wanted: str | None,
) -> TrainingData:
    snapshot_id = begun.source_id
    if wanted not in {None, snapshot_id}:
        raise MismatchError(
            f"run {run_path.name} learns from snapshot {snapshot_id}, not from {wanted}; train "
            "another run (--run)"
        )
    own = own_dataset(begun.record, dataset, run_path)
    tokens = tokens_of_run(target, own, space, run_path.name, begun.tokens)
    if snapshot_id not in store.snapshot_ids():
        _publish_again(store, commits, snapshot_id, tokens, run_path)
    held_out = set(commits.usable(TokenFile(tokens.held_out_path).sample_ids))
    num_lost = len(held_out - commits.held(held_out))
    if num_lost:
        raise MismatchError(
            f"{num_lost:,} of {len(held_out):,} samples that run {run_path.name} holds out have no "
            f"states in {store.root.url} any more; run hidden-states with the data set that it "
            "began with, or train another run (--run)"
        )
    snapshot = store.snapshot(snapshot_id)
    return TrainingData(snapshot=snapshot, tokens=tokens, commits=commits, begun=begun)


def own_dataset(run: Run | None, dataset: DatasetConfig, run_path: Path) -> DatasetConfig:
    """Return the data set settings of a run that has begun; warn where the recipe has others."""
    if run is None or run.dataset == dataset:
        return dataset
    own, now = run.dataset.model_dump(), dataset.model_dump()
    changed = ", ".join(
        f"{name}: {own[name]!r} there, {now[name]!r} in the recipe"
        for name in now
        if own[name] != now[name]
    )
    logger.warning("run %s keeps its data set settings (%s)", run_path.name, changed)
    return run.dataset


def _publish_again(
    store: Store,
    commits: Commits,
    snapshot_id: str,
    tokens: TokensSummary,
    run_path: Path,
) -> None:
    """Publish the lost snapshot of a run, if its samples still lie where it had them."""
    with suppress(StorageError):
        train = commits.usable(TokenFile(tokens.train_path).sample_ids)
        if Snapshot.of(train, commits).snapshot_id == snapshot_id:
            store.publish(train, commits=commits, as_latest=False)
            return
    raise MismatchError(
        f"run {run_path.name} learns from snapshot {snapshot_id}, which {store.root.url} does not "
        f"have, and its samples have other places by now; it has: "
        f"{', '.join(store.snapshot_ids()) or 'none'}. Restore it, or train another run (--run)"
    )


def _compare_with_now(
    store: Store,
    own: Snapshot,
    training: TrainingConfig,
    space: Workspace,
    run_path: Path,
    *,
    step: int,
) -> None:
    """Say that a data set has newer data than a run; refuse where that must be what was meant."""
    try:
        now = store.refs.get(space.snapshot_name("train"))
    except CorruptError as error:
        logger.warning("whether the data set has newer data is not known: %s", error)
        return
    if now is None or now == own.snapshot_id or now not in store.snapshot_ids():
        return
    newer = store.snapshot(now)
    what = (
        f"run {run_path.name} learns from snapshot {own.snapshot_id} ({own.num_samples:,} samples)"
        f", and data set {space.dataset} is snapshot {now} ({newer.num_samples:,}) since "
        "hidden-states ran last"
    )
    num_shared = len(newer.members & own.members)
    if was_replaced(own.num_samples, newer.num_samples, num_shared=num_shared):
        raise MismatchError(
            f"{what}, with {num_shared:,} of them. If the data was replaced, train another run "
            "(--run), or delete this one's folder to begin again; if hidden-states ran with other "
            "settings, run it once more with this recipe"
        )
    total = total_steps(training, own.lengths, own.groups, world_size=training.num_processes)
    if step >= total:
        raise MismatchError(
            f"{what}; it has done its {total:,} steps. To learn from that data train another run "
            "(--run), which may begin where this one ended (training.start_from)"
        )
    logger.warning("%s; it goes on with its own", what)


def was_replaced(num_own: int, num_now: int, *, num_shared: int) -> bool:
    """Tell whether data of now cannot be the data of a run, grown or cut: most of it is other."""
    return num_shared <= num_own / 2 and num_shared < num_now


def _asked_for(
    store: Store,
    commits: Commits,
    target: TargetConfig,
    dataset: DatasetConfig,
    space: Workspace,
    snapshot_id: str,
) -> TrainingData:
    """Return a snapshot with the tokens that it was made from, of which none need be the newest."""
    snapshot = store.snapshot(snapshot_id)
    # Of two versions that differ in what they hold out alone, hidden-states says which it was.
    name = space.snapshot_name("train")
    last = store.refs.made_from(name) if store.refs.get(name) == snapshot_id else ""
    files = sorted(
        space.tokens_path.glob("train-*.arrow"),
        key=lambda path: (path == space.token_file("train", last), path.stat().st_mtime),
        reverse=True,
    )
    excluded = frozenset(map(bytes.fromhex, commits.excluded))
    wanted = snapshot.members - excluded
    for path in files:
        if _members(path) - excluded == wanted:
            tokens = known_tokens(target, space, path.stem.removeprefix("train-"))
            if tokens is not None:
                return TrainingData(snapshot=snapshot, tokens=tokens, commits=commits)
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
    return TrainingData(snapshot=snapshot, tokens=tokens, commits=commits)


def _of_the_data_set(
    store: Store,
    commits: Commits,
    target: TargetConfig,
    dataset: DatasetConfig,
    space: Workspace,
) -> TrainingData:
    tokens = prepare(target, dataset, str(space.home))[1]
    train = commits.usable(TokenFile(tokens.train_path).sample_ids)
    wanted = {*train, *commits.usable(TokenFile(tokens.held_out_path).sample_ids)}
    num_there = len(commits.held(wanted))
    if num_there < len(wanted):
        raise ConfigError(
            f"the store at {store.root.url} holds {num_there:,} of {len(wanted):,} samples of data "
            f"set {dataset.name}; run hidden-states with this recipe{_or_else(store, space)}"
        )
    snapshot = Snapshot.of(train, commits)
    if snapshot.snapshot_id not in store.snapshot_ids():
        try:
            store.publish(train, commits=commits, as_latest=False)
        except StorageError as error:
            raise ConfigError(
                f"data set {dataset.name} with these settings is no snapshot of {store.root.url} "
                f"yet, and it cannot be published: {error}. Make the store writable, or run "
                "hidden-states with this recipe where it is"
            ) from error
    return TrainingData(snapshot=snapshot, tokens=tokens, commits=commits)


def _or_else(store: Store, space: Workspace) -> str:
    earlier = store.refs.get(space.snapshot_name("train"))
    if earlier is None:
        return ""
    return f", or train on what it was when that ran last (--snapshot {earlier})"


def _members(path: Path) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(name) for name in TokenFile(path).sample_ids)
