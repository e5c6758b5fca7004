"""Put many commit records together, so that a store opens with a few reads.

Safe at any moment beside others that read, write, revoke and compact: manifests never change, a
record is removed only when a manifest has had it for a while, and a manifest only when another one
has its rows.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from storage.commit_log import CommitLog, Listing, record_key, revocations
from storage.commits import Commits
from storage.manifest import (
    FOLDER,
    KINDS,
    Manifest,
    delete_manifest,
    keys_of,
    record_id,
)
from storage.record import CommitRecord

COMPACT_FROM = 1000
"""Single records from which on a manifest is worth its files."""
MOST_SHARDS = 50_000
"""In a manifest that others are merged into."""
SETTLE_SECONDS = 3600.0
"""A record stays beside the manifest that has it, for whoever lists the one and not yet the other.
"""


def is_worth_compacting(log: CommitLog) -> bool:
    """Tell whether there are so many single records that `compact` has something to do."""
    return len(Listing.of(log.root).records) >= COMPACT_FROM


def compact(log: CommitLog) -> None:
    """Put single records into a manifest, and remove those that have been in one for a while.

    Raises:
        CorruptError: a record or a manifest is damaged.

    """
    records = _there(log, Listing.of(log.root).records)
    if len(records) < COMPACT_FROM:
        return
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
    if len(fresh) >= COMPACT_FROM:
        _put_together(log, fresh)
    still = _there(log, [record.shard_id for record in settled])
    gone = [one.shard_id for one in settled if still.get(one.shard_id) == one]
    log.root.delete_many([record_key(shard_id) for shard_id in gone])


def complete_copies(log: CommitLog) -> None:
    """Write copies of manifests that a kill kept from being written."""
    manifests = log.manifests()
    there = {f"{FOLDER}/{key}" for key in log.root.sizes(FOLDER)} if manifests else set()
    for manifest in manifests:
        keys = {key for kind in KINDS for key in keys_of(manifest.manifest_id, kind)}
        if not keys <= there:
            manifest.mend()


def _there(log: CommitLog, shard_ids: Sequence[str]) -> Mapping[str, CommitRecord]:
    """Return those of some single records that are there."""
    with suppress(FileNotFoundError):
        return log.alone(shard_ids)
    found: dict[str, CommitRecord] = {}
    for shard_id in shard_ids:  # others compact, or revoke, at the same time
        with suppress(FileNotFoundError):
            found |= log.alone([shard_id])
    return found


def _put_together(log: CommitLog, fresh: Sequence[CommitRecord]) -> None:
    """Write a manifest of single records and of smaller manifests, which are then removed."""
    records = {record.shard_id: record for record in fresh}
    parts = log.consistently(lambda: log.parts(Listing.of(log.root), list(records)))
    merged: list[Manifest] = []
    for part in sorted(parts, key=lambda part: int(part.keep.sum())):
        size = int(part.keep.sum())
        if size <= len(records) <= MOST_SHARDS - size:
            records.update(Commits({}, [part]))
            merged.append(part.manifest)
    everything = list(records.values())
    for first in range(0, len(everything), MOST_SHARDS):
        members = everything[first : first + MOST_SHARDS]
        Manifest.write(log.root, members, identity_id=log.identity_id)
    for record in fresh:
        for part in parts:  # of a shard, one row counts when its single record is gone
            name = part.manifest.record_id_of(record.shard_id)
            if part.manifest not in merged and name not in (None, record_id(record)):
                log.revoke_row(record.shard_id, str(name))
    for manifest in merged:
        delete_manifest(log.root, manifest.manifest_id)


def _written_at(log: CommitLog) -> Mapping[str, float]:
    """Return when each manifest was written, by the clock of the place."""
    return {
        key.partition(".")[0]: entry.modified
        for key, entry in log.root.entries(FOLDER).items()
        if "/" not in key
    }
