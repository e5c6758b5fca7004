"""Which snapshot a run trains on: its own once it has begun, else that of its data set."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from eagle_core.atomic_files import write_text
from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.pieces import Windows
from eagle_core.training.schedule import RunSteps
from flows.bridge.draft_setup import begun_draft
from flows.bridge.first_weights import as_begun
from flows.bridge.run import BegunRun, Run, begun_run
from flows.bridge.token_files import known_tokens
from flows.config.run import RunConfig
from flows.summaries import TokensSummary
from flows.tasks.prepare import prepare, tokens_of_run
from flows.workspace import Workspace
from storage.errors import CorruptError, StorageError
from storage.records.commits import Commits
from storage.records.snapshot import Snapshot
from storage.store import Store

ID_NAME = ".id"
"""File in a run's folder that distinguishes it from runs of its name on other machines."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """A snapshot without held-out samples, and the tokens that it was made from."""

    snapshot: Snapshot
    tokens: TokensSummary
    commits: Commits
    """Commit records of the store, read once."""
    begun: BegunRun | None = None

    @property
    def record(self) -> Run | None:
        """The record of the run, if it has begun and wrote one."""
        return None if self.begun is None else self.begun.record


def training_data(
    store: Store,
    config: RunConfig,
    space: Workspace,
    run_path: Path,
    *,
    snapshot_id: str | None,
) -> TrainingData:
    """Return the data that a run trains on.

    A run that has begun resumes with its own snapshot, and reads no data set. A new one uses the
    requested snapshot, or else that of the current data set, which is published if missing.

    Raises:
        ConfigError: states are missing from the store; the message counts them.
        MismatchError: the snapshot is of other data, has held-out samples, or is not the run's.

    """
    begun = begun_run(run_path)
    origin = _Origin(
        store=store, commits=store.commits(), config=config, space=space, run_path=run_path
    )
    if begun is not None:
        data = origin.own(begun, wanted=snapshot_id)
        if snapshot_id is None:
            origin.compare_with_now(data.snapshot, begun)
    elif snapshot_id is not None:
        data = origin.asked_for(snapshot_id)
    else:
        data = origin.of_the_data_set()
    held_out = _members(data.tokens.held_out_path)
    num_held_out = len(held_out & data.snapshot.members)
    if num_held_out:
        raise MismatchError(
            f"snapshot {data.snapshot.snapshot_id} of {store.root.url} has {num_held_out:,} of the "
            f"{len(held_out):,} samples that data set {config.dataset.name} holds out: they must "
            "not be trained on. Run hidden-states with this recipe, then train another run"
        )
    return data


@contextmanager
def held_by_run(store: Store, run_path: Path, data: TrainingData) -> Iterator[None]:
    """Protect a run's snapshots from garbage collection until the block ends without an error.

    These are its own snapshot, and the one of its held-out samples. An id in the run's folder
    distinguishes it from runs of the same name; snapshots that it held before are released.
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
        logger.warning("do not run gc until run %s has ended: %s", run, error)
    yield
    if held:
        try:
            store.refs.release_all(run)
        except StorageError as error:
            logger.warning("gc still keeps the snapshots of run %s: %s", run, error)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Origin:
    """The sources of a run's samples: a store, and the data set of a recipe."""

    store: Store
    commits: Commits
    config: RunConfig
    space: Workspace
    run_path: Path

    def own(self, begun: BegunRun, *, wanted: str | None) -> TrainingData:
        snapshot_id = begun.source_id
        if wanted not in {None, snapshot_id}:
            raise MismatchError(
                f"run {self.run_path.name} trains on snapshot {snapshot_id}, not on {wanted}; "
                "train another run (--run)"
            )
        own = own_dataset(begun.record, self.config.dataset, self.run_path)
        tokens = tokens_of_run(
            self.config.target, own, self.space, self.run_path.name, begun.tokens
        )
        if snapshot_id not in self.store.snapshot_ids():
            self._republish(snapshot_id, tokens)
        held_out = set(self.commits.usable(TokenFile(tokens.held_out_path).sample_ids))
        num_lost = len(held_out - self.commits.held(held_out))
        if num_lost:
            raise MismatchError(
                f"{num_lost:,} of {len(held_out):,} samples that run {self.run_path.name} holds "
                f"out have no states in {self.store.root.url} any more; run hidden-states with the "
                "data set that it started with, or train another run (--run)"
            )
        snapshot = self.store.snapshot(snapshot_id)
        return TrainingData(snapshot=snapshot, tokens=tokens, commits=self.commits, begun=begun)

    def _republish(self, snapshot_id: str, tokens: TokensSummary) -> None:
        """Publish the lost snapshot of a run again, if its samples are still in the same places."""
        with suppress(StorageError):
            train = self.commits.usable(TokenFile(tokens.train_path).sample_ids)
            if Snapshot.of(train, self.commits).snapshot_id == snapshot_id:
                self.store.publish(train, commits=self.commits, as_latest=False)
                return
        raise MismatchError(
            f"run {self.run_path.name} trains on snapshot {snapshot_id}, which is missing from "
            f"{self.store.root.url}, and its samples are no longer in the same places; the store "
            f"has snapshots: {', '.join(self.store.snapshot_ids()) or 'none'}. Restore the "
            "snapshot, or train another run (--run)"
        )

    def compare_with_now(self, own: Snapshot, begun: BegunRun) -> None:
        """Warn if the data set is newer than the run's data; refuse if it was surely meant."""
        try:
            now = self.store.refs.get(self.space.snapshot_name("train"))
        except CorruptError as error:
            logger.warning("cannot check whether the data set has newer data: %s", error)
            return
        if now is None or now == own.snapshot_id or now not in self.store.snapshot_ids():
            return
        newer = self.store.snapshot(now)
        what = (
            f"run {self.run_path.name} trains on snapshot {own.snapshot_id} ({own.num_samples:,} "
            f"samples), but since the last hidden-states run data set {self.space.dataset} is "
            f"snapshot {now} ({newer.num_samples:,} samples)"
        )
        num_shared = len(newer.members & own.members)
        if was_replaced(own.num_samples, newer.num_samples, num_shared=num_shared):
            raise MismatchError(
                f"{what}, with {num_shared:,} samples in both. If the data was replaced, train "
                "another run (--run), or delete this run's folder to start over; if hidden-states "
                "ran with other settings, run it again with this recipe"
            )
        training, draft = as_begun(self.config.training, self.run_path), begun_draft(self.run_path)
        assert draft is not None  # noqa: S101 (the run has begun)
        total = RunSteps(
            config=training,
            lengths=own.lengths,
            groups=own.groups,
            windows=Windows.of(training, draft),
            world_size=training.world_size,
            step=begun.step,
            loader=begun.loader,
        ).last()
        if begun.step >= total:
            raise MismatchError(
                f"{what}; the run has done its {total:,} steps. To train on that data, train "
                "another run (--run), which may start from this run's draft (training.start)"
            )
        logger.warning("%s; the run continues with its own data", what)

    def asked_for(self, snapshot_id: str) -> TrainingData:
        """Return a snapshot with the tokens that it was made from, which may be outdated."""
        snapshot = self.store.snapshot(snapshot_id)
        # If two versions differ only in held-out samples, the last hidden-states run decides.
        name = self.space.snapshot_name("train")
        last = self.store.refs.made_from(name) if self.store.refs.get(name) == snapshot_id else ""
        files = sorted(
            self.space.tokens_path.glob("train-*.arrow"),
            key=lambda path: (path == self.space.token_file("train", last), path.stat().st_mtime),
            reverse=True,
        )
        excluded = frozenset(map(bytes.fromhex, self.commits.excluded))
        wanted = snapshot.members - excluded
        for path in files:
            if _members(path) - excluded == wanted:
                tokens = known_tokens(
                    self.config.target, self.space, path.stem.removeprefix("train-")
                )
                if tokens is not None:
                    return TrainingData(snapshot=snapshot, tokens=tokens, commits=self.commits)
        tokens = self._prepared()
        num_shared = len(_members(tokens.train_path) & snapshot.members)
        num_held_out = len(_members(tokens.held_out_path) & snapshot.members)
        if num_shared < snapshot.num_samples:
            raise MismatchError(
                f"of the {snapshot.num_samples:,} samples in snapshot {snapshot_id} of "
                f"{self.store.root.url}, the current data set {self.config.dataset.name} has "
                f"{num_shared:,} for training and holds out {num_held_out:,}, and no tokens of an "
                "earlier version of it exist here; choose another snapshot (`eyas inspect` lists "
                "them), or the recipe that made it"
            )
        return TrainingData(snapshot=snapshot, tokens=tokens, commits=self.commits)

    def of_the_data_set(self) -> TrainingData:
        tokens = self._prepared()
        train = self.commits.usable(TokenFile(tokens.train_path).sample_ids)
        wanted = {*train, *self.commits.usable(TokenFile(tokens.held_out_path).sample_ids)}
        num_there = len(self.commits.held(wanted))
        if num_there < len(wanted):
            raise ConfigError(
                f"the store at {self.store.root.url} holds {num_there:,} of {len(wanted):,} "
                f"samples of data set {self.config.dataset.name}; run hidden-states with this "
                f"recipe{self._or_else()}"
            )
        snapshot = Snapshot.of(train, self.commits)
        if snapshot.snapshot_id not in self.store.snapshot_ids():
            try:
                self.store.publish(train, commits=self.commits, as_latest=False)
            except StorageError as error:
                raise ConfigError(
                    f"data set {self.config.dataset.name} with these settings has no snapshot in "
                    f"{self.store.root.url} yet, and none can be published: {error}. Make the "
                    "store writable, or run hidden-states with this recipe where it is writable"
                ) from error
        return TrainingData(snapshot=snapshot, tokens=tokens, commits=self.commits)

    def _or_else(self) -> str:
        earlier = self.store.refs.get(self.space.snapshot_name("train"))
        if earlier is None:
            return ""
        return f", or train on the snapshot of its last run (--snapshot {earlier})"

    def _prepared(self) -> TokensSummary:
        """Return the tokens of the current data set, built if necessary."""
        return prepare(self.config.target, self.config.dataset, str(self.space.home))[1]


def own_dataset(run: Run | None, dataset: DatasetConfig, run_path: Path) -> DatasetConfig:
    """Return the data set settings of a run that has begun; warn if the recipe differs."""
    if run is None or run.dataset == dataset:
        return dataset
    own, now = run.dataset.model_dump(), dataset.model_dump()
    changed = ", ".join(
        f"{name}: {own[name]!r} in the run, {now[name]!r} in the recipe"
        for name in now
        if own[name] != now[name]
    )
    logger.warning("run %s keeps its data set settings (%s)", run_path.name, changed)
    return run.dataset


def was_replaced(num_own: int, num_now: int, *, num_shared: int) -> bool:
    """Return whether current data cannot be the data of a run, grown or cut: most of it differs."""
    return num_shared <= num_own / 2 and num_shared < num_now


def _members(path: Path) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(name) for name in TokenFile(path).sample_ids)
