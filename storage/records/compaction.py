"""Compact many commit records into manifests, so that a store opens with a few reads.

Safe while other processes read, write, revoke and compact: manifests never change, and a record or
a manifest is removed only when another manifest has contained all of it for a while.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from storage.records import keys
from storage.records.commit_log import CommitLog, Listing, revocations
from storage.records.commit_record import CommitRecord
from storage.records.commits import Commits
from storage.records.manifest import Manifest, delete_manifest, record_id

COMPACT_FROM = 1000
"""Number of single records from which a manifest is worth its files."""
MOST_SHARDS = 50_000
"""Maximum number of shards in a manifest that others are merged into."""
SETTLE_SECONDS = 3600.0
"""How long records remain after a newer manifest contains them: a reader may have listed the old
objects and still read them, or not see the new manifest yet."""
REMOVED_AT_A_TIME = 1000


def is_worth_compacting(log: CommitLog) -> bool:
    """Return whether there are many single records, or manifests that may be too many."""
    listing = Listing.of(log.root)
    return len(listing.records) >= COMPACT_FROM or bool(listing.manifest_ids)


def compact(log: CommitLog) -> None:
    """Write single records to a manifest, and remove those that have been in one for a while.

    Raises:
        CorruptError: a record or a manifest is damaged.

    """
    records = _existing(log, Listing.of(log.root).records)
    manifests, written, revoked = log.manifests(), _written_at(log), revocations(log.root)
    fresh: list[CommitRecord] = []
    settled: list[CommitRecord] = []
    for record in records.values():
        name = record_id(record)
        if (record.shard_id, name) in revoked:
            continue  # a kill interrupted the revocation: as a row it would be lost
        times = [
            written.get(manifest.manifest_id, time.time())
            for manifest in manifests
            if manifest.record_id_of(record.shard_id) == name
        ]
        if not times:
            fresh.append(record)
        elif min(times) < time.time() - SETTLE_SECONDS:
            settled.append(record)
    _revoke_older(log, manifests, [*fresh, *settled])
    if len(fresh) >= COMPACT_FROM:
        _write_manifests(log, fresh)
    _remove_settled(log, settled)
    _remove_covered(log, manifests, written)


def _existing(log: CommitLog, shard_ids: Sequence[str]) -> Mapping[str, CommitRecord]:
    """Return the single records that exist: other processes may compact or revoke, too."""
    return log.alone(shard_ids, absent_ok=True)


def _revoke_older(
    log: CommitLog, manifests: Sequence[Manifest], records: Sequence[CommitRecord]
) -> None:
    """Revoke older rows of a shard, which would count once its newer, single record is gone."""
    for record in records:
        for manifest in manifests:
            name = manifest.record_id_of(record.shard_id)
            if name is not None and name != record_id(record):
                log.revoke_row(record.shard_id, name)


def _write_manifests(log: CommitLog, fresh: Sequence[CommitRecord]) -> None:
    """Write manifests of single records, merged with smaller manifests."""
    records = {record.shard_id: record for record in fresh}
    parts = log.consistently(lambda: log.parts(Listing.of(log.root), list(records)))
    for part in sorted(parts, key=lambda part: int(part.keep.sum())):
        size = int(part.keep.sum())
        if size <= len(records) <= MOST_SHARDS - size:
            records.update(Commits({}, [part]))
    everything = list(records.values())
    for first in range(0, len(everything), MOST_SHARDS):
        members = everything[first : first + MOST_SHARDS]
        Manifest.write(log.root, members, identity_id=log.identity_id)


def _remove_settled(log: CommitLog, settled: Sequence[CommitRecord]) -> None:
    """Remove single records that a manifest has contained for a while, unless they are new.

    A shard may have been revoked and written again since its record was read.
    """
    still = _existing(log, [record.shard_id for record in settled])
    gone = [one.shard_id for one in settled if still.get(one.shard_id) == one]
    for first in range(0, len(gone), REMOVED_AT_A_TIME):
        written = log.root.entries(keys.RECORDS)
        limit = time.time() - SETTLE_SECONDS
        gone_keys = [keys.record(shard_id) for shard_id in gone[first : first + REMOVED_AT_A_TIME]]
        log.root.delete_many(
            [
                key
                for key in gone_keys
                if (entry := written.get(key.partition("/")[2])) and entry.modified < limit
            ]
        )


def _remove_covered(
    log: CommitLog, manifests: Sequence[Manifest], written: Mapping[str, float]
) -> None:
    """Remove manifests whose rows are all in larger ones that have existed for a while."""
    limit = time.time() - SETTLE_SECONDS
    ordered = sorted(manifests, key=lambda one: (len(one.shard_ids), one.manifest_id))
    for index, manifest in enumerate(ordered):
        left = np.ones(len(manifest.shard_ids), np.bool_)
        for larger in ordered[index + 1 :]:
            if written.get(larger.manifest_id, limit) < limit:
                left &= ~larger.has(manifest.shard_ids, manifest.record_ids)
        if not left.any():
            delete_manifest(log.root, manifest.manifest_id)


def _written_at(log: CommitLog) -> Mapping[str, float]:
    """Return when each manifest was written, by the clock of the disk or server."""
    return {
        key.rpartition("/")[2].partition(".")[0]: entry.modified
        for key, entry in log.root.entries(keys.MANIFESTS).items()
    }
