"""Put many commit records together, so that a store opens with a few reads.

Safe at any moment beside others that read, write, revoke and compact: manifests never change, and a
record, or a manifest, is removed only when another manifest has had all of it for a while.
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
"""Single records from which on a manifest is worth its files."""
MOST_SHARDS = 50_000
"""In a manifest that others are merged into."""
SETTLE_SECONDS = 3600.0
"""What a newer manifest has stays beside it for so long, for whoever has listed the one and reads
on, or does not see the other yet."""
REMOVED_AT_A_TIME = 1000


def is_worth_compacting(log: CommitLog) -> bool:
    """Tell whether there are many single records, or manifests that may have become too many."""
    listing = Listing.of(log.root)
    return len(listing.records) >= COMPACT_FROM or bool(listing.manifest_ids)


def compact(log: CommitLog) -> None:
    """Put single records into a manifest, and remove those that have been in one for a while.

    Raises:
        CorruptError: a record or a manifest is damaged.

    """
    records = _there(log, Listing.of(log.root).records)
    manifests, written, revoked = log.manifests(), _written_at(log), revocations(log.root)
    fresh: list[CommitRecord] = []
    settled: list[CommitRecord] = []
    for record in records.values():
        name = record_id(record)
        if (record.shard_id, name) in revoked:
            continue  # a kill ended that half-way: as a row it would be lost
        there = [
            written.get(manifest.manifest_id, time.time())
            for manifest in manifests
            if manifest.record_id_of(record.shard_id) == name
        ]
        if not there:
            fresh.append(record)
        elif min(there) < time.time() - SETTLE_SECONDS:
            settled.append(record)
    _revoke_older(log, manifests, [*fresh, *settled])
    if len(fresh) >= COMPACT_FROM:
        _put_together(log, fresh)
    _remove_settled(log, settled)
    _remove_covered(log, manifests, written)


def _there(log: CommitLog, shard_ids: Sequence[str]) -> Mapping[str, CommitRecord]:
    """Return those of some single records that are there: others compact, or revoke, too."""
    return log.alone(shard_ids, absent_ok=True)


def _revoke_older(
    log: CommitLog, manifests: Sequence[Manifest], records: Sequence[CommitRecord]
) -> None:
    """Let no older row of a shard count when its newer, single record is gone."""
    for record in records:
        for manifest in manifests:
            name = manifest.record_id_of(record.shard_id)
            if name is not None and name != record_id(record):
                log.revoke_row(record.shard_id, name)


def _put_together(log: CommitLog, fresh: Sequence[CommitRecord]) -> None:
    """Write manifests of single records, and of what smaller manifests have."""
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
    """Remove single records that a manifest has had for a while, unless they are new themselves.

    A shard may have been taken back and written again since its record was read.
    """
    still = _there(log, [record.shard_id for record in settled])
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
    """Remove manifests of which a larger one, that was there for a while, has every row."""
    limit = time.time() - SETTLE_SECONDS
    ordered = sorted(manifests, key=lambda one: (len(one.shard_ids), one.manifest_id))
    for place, manifest in enumerate(ordered):
        left = np.ones(len(manifest.shard_ids), np.bool_)
        for larger in ordered[place + 1 :]:
            if written.get(larger.manifest_id, limit) < limit:
                left &= ~larger.has(manifest.shard_ids, manifest.record_ids)
        if not left.any():
            delete_manifest(log.root, manifest.manifest_id)


def _written_at(log: CommitLog) -> Mapping[str, float]:
    """Return when each manifest was written, by the clock of the place."""
    return {
        key.rpartition("/")[2].partition(".")[0]: entry.modified
        for key, entry in log.root.entries(keys.MANIFESTS).items()
    }
