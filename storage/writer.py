"""Write one shard so that it ends whole and committed, despite concurrent writers.

Data is written under a unique name, read back and checked; only then is its record created, if
there is none. So nothing that another writer may need is ever overwritten or removed, and no kind
of store needs a lock. An attempt that finishes second, or was killed, is garbage: no record names
it.
"""

import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from storage.encoding import zip_file
from storage.encoding.shard import raw_bytes, write_arrays
from storage.errors import (
    CorruptError,
    SampleRefusedError,
    ShardCorruptError,
    ShardMissingError,
    StorageError,
    TransientError,
)
from storage.objects.digests import ObjectDigest, RunningDigest
from storage.objects.object_store import ObjectStore
from storage.probe import require_probe
from storage.recompute import Recompute
from storage.records import keys
from storage.records.commit_log import CommitLog
from storage.records.commit_record import CommitRecord
from storage.records.identity import StoreIdentity
from storage.records.plan import PlannedShard
from storage.records.presence import Finding, check_sizes
from storage.records.probe_point import ProbePoint
from storage.samples import StoredSample, require_storable
from storage.shard_checks import check_digests, check_meaning, read_objects


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWriter:
    """Writes the shards of one store."""

    root: ObjectStore
    identity: StoreIdentity
    log: CommitLog

    def write(
        self,
        shard: PlannedShard,
        samples: Iterable[StoredSample],
        probe: Sequence[ProbePoint],
        recompute: Recompute | None,
    ) -> CommitRecord:
        """Write a shard and commit it; see `Store.write_shard`."""
        current = self._current_record(shard.shard_id)
        if current is not None:
            return current
        ordered = self._checked(shard, samples)
        require_probe(probe, {sample.sample_id: sample for sample in ordered}, self.identity)
        attempt = f"{secrets.token_hex(8)}{keys.SHARD_SUFFIX}"
        key = keys.shard_object(shard.shard_id, attempt)
        try:
            record = CommitRecord(
                shard_id=shard.shard_id,
                identity_id=self.identity.identity_id,
                sample_ids=shard.sample_ids,
                sample_tokens=tuple(len(sample) for sample in ordered),
                sample_supervised=tuple(int(sample.loss_mask.sum()) for sample in ordered),
                raw_bytes=raw_bytes(ordered),
                objects={attempt: self._write_data(shard.shard_id, key, ordered)},
                probe=tuple(probe),
            )
            self._require_correct(record, recompute)
            current = self._commit(record)
        except TransientError:  # a record that was sent to a server may still appear
            raise
        except Exception:  # also what the target raised while it checked the states
            self._delete_unnamed(shard.shard_id, attempt)
            raise
        if current != record:
            self._delete_unnamed(shard.shard_id, attempt)
        for lost in check_sizes(self.root, current):
            raise TransientError(
                f"{lost.object_key} {lost.problem}, although it was just written: is a garbage "
                "collection (gc) running at the same time? Stop it, then run the same command again"
            )
        return current

    def _write_data(self, shard_id: str, key: str, samples: Sequence[StoredSample]) -> ObjectDigest:
        digest = RunningDigest()
        with self.root.open(key) as append:

            def write(data: bytes) -> None:
                append(data)
                digest.update(data)

            with zip_file.packing(write) as open_object:
                write_arrays(shard_id, samples, self.identity, open_object)
        self.root.flush(keys.shard_folder(shard_id))
        return digest.value()

    def _require_correct(self, record: CommitRecord, recompute: Recompute | None) -> None:
        """Raise ShardCorruptError unless the stored bytes are intact and reproduce the probe.

        Omitted states must be recomputed bit for bit.
        """
        found: Iterable[Finding]
        if recompute is None:
            damaged, found = list(check_digests(self.root, record)), ()
        else:
            objects, damaged = read_objects(self.root, record)
            found = check_meaning(record, objects, self.identity, recompute, exact=True)
        if damaged:
            raise ShardCorruptError(
                f"shard {record.shard_id} does not read back as it was written: "
                f"{damaged[0].object_key} {damaged[0].problem}. It is not committed; run the same "
                "command again. If it was removed, a garbage collection (gc) ran at the same time; "
                "otherwise this machine's memory or disk may be faulty"
            )
        for finding in found:
            raise ShardCorruptError(
                f"shard {record.shard_id} was stored but does not reproduce what the target "
                f"predicted: {finding.object_key}: {finding.problem}. It is not committed; run the "
                "same command again. If that fails the same way, the states are captured wrongly "
                "(layer, norm, a head with a bias), layers of this target cannot be run alone (set "
                "store.recompute to false), or this machine's memory or disk is faulty"
            )

    def _commit(self, record: CommitRecord) -> CommitRecord:
        """Return the current record: this one, or that of a concurrent writer that came first."""
        if self.log.create(record):
            return record
        current = self._current_record(record.shard_id)
        if current is not None:
            return current
        self.log.replace(record)  # the existing one is damaged, or its data is missing
        return record

    def _delete_unnamed(self, shard_id: str, attempt: str) -> None:
        """Delete the data of an attempt, unless a record names it or may name it."""
        with suppress(StorageError):
            try:
                named = attempt in self.log.objects(shard_id)
            except ShardMissingError:
                named = False
            if not named:
                self.root.delete(keys.shard_object(shard_id, attempt))

    def _current_record(self, shard_id: str) -> CommitRecord | None:
        """Return the record if it is intact and all its objects exist with their sizes."""
        try:
            record = self.log.find(shard_id)
        except (ShardMissingError, CorruptError):
            return None
        return None if any(check_sizes(self.root, record)) else record

    def _checked(
        self, shard: PlannedShard, samples: Iterable[StoredSample]
    ) -> Sequence[StoredSample]:
        by_id: dict[str, StoredSample] = {}
        for sample in samples:
            require_storable(sample, self.identity)
            by_id[sample.sample_id] = sample
        if by_id.keys() != set(shard.sample_ids):
            missing = sorted(set(shard.sample_ids) - by_id.keys())
            unplanned = sorted(by_id.keys() - set(shard.sample_ids))
            raise SampleRefusedError(
                f"shard {shard.shard_id} was given the wrong samples: {len(missing)} missing "
                f"{missing[:1]}, {len(unplanned)} not planned {unplanned[:1]}"
            )
        return [by_id[sample_id] for sample_id in shard.sample_ids]
