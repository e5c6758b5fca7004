"""Which snapshot a run learns from: its own if it was interrupted, else that of its data set."""

import logging
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from eagle_core import checkpoint
from eagle_core.tokens import TokenFile
from flows.run_record import TRAINING_NAME, RunRecord
from flows.summaries import TokensSummary
from storage.errors import ConfigError, MismatchError
from storage.snapshot import Snapshot
from storage.store import Store

logger = logging.getLogger(__name__)


def training_snapshot(
    store: Store, tokens: TokensSummary, dataset: str, run_path: Path
) -> Snapshot:
    """Return the snapshot to train on, which has no held-out sample.

    A run that was interrupted goes on with its own. Others take that of the data set as it is now
    or, without one, the latest, if most of it is of the data set.

    Raises:
        ConfigError: there is no snapshot yet.
        MismatchError: there are only those of other data, or of the held-out split.

    """
    ours = _members(tokens.train_path)
    snapshot = _interrupted(store, ours, run_path) or _newest(store, ours, dataset)
    held_out = _members(tokens.held_out_path)
    num_held_out = len(held_out & snapshot.members)
    if num_held_out:
        raise MismatchError(
            f"snapshot {snapshot.snapshot_id} of {store.root.url} has {num_held_out:,} of the "
            f"{len(held_out):,} samples that data set {dataset} holds out as it is now: its "
            "conversations, held_out_fraction or max_length have changed since. Restore them, or "
            "run hidden-states with this recipe and train under another run name"
        )
    return snapshot


def _members(path: Path) -> AbstractSet[bytes]:
    return {bytes.fromhex(name) for name in TokenFile(path).sample_ids}


def _interrupted(store: Store, ours: AbstractSet[bytes], run_path: Path) -> Snapshot | None:
    """Return the snapshot of a run that has not ended, if it is there and of the same data."""
    folder = checkpoint.newest(run_path)
    if folder is None:
        return None
    found, record = checkpoint.read(folder), RunRecord.read(run_path)
    if TRAINING_NAME in record.outdated or (
        record.training and record.training.num_steps >= found.step
    ):
        return None
    if found.loader.source_id not in store.snapshot_ids():
        return None
    snapshot = store.snapshot(found.loader.source_id)
    if len(snapshot.members & ours) <= snapshot.num_samples / 2:
        return None
    if snapshot.members != ours:
        logger.warning(
            "run %s goes on with the snapshot it began with, %s of %s samples; the data set has %s "
            "by now: train under another run name to learn from them",
            *(run_path.name, snapshot.snapshot_id[:8], f"{snapshot.num_samples:,}"),
            f"{len(ours):,}",
        )
    return snapshot


def _newest(store: Store, ours: AbstractSet[bytes], dataset: str) -> Snapshot:
    latest = store.snapshot()
    if latest.members == ours:
        return latest
    with suppress(ConfigError):  # some samples have no states yet
        snapshot_id = Snapshot.of((name.hex() for name in ours), store.commits()).snapshot_id
        if snapshot_id in store.snapshot_ids():
            return store.snapshot(snapshot_id)
    num_shared = len(latest.members & ours)
    if num_shared <= latest.num_samples / 2:
        raise MismatchError(
            f"of the {latest.num_samples:,} samples in the latest snapshot of {store.root.url}, "
            f"{num_shared:,} are of data set {dataset}, and no other snapshot holds that as it is "
            "now; run hidden-states with this recipe first"
        )
    logger.warning(
        "the latest snapshot has %s samples, %s of them of data set %s, which has %s as it is now: "
        "hidden-states makes the rest",
        *(f"{latest.num_samples:,}", f"{num_shared:,}", dataset, f"{len(ours):,}"),
    )
    return latest
