"""Write one shard so that it ends whole and committed, whoever else writes it at the same time.

On a disk a lock keeps rivals out, so what an earlier attempt left behind is swept first. On an
object store nobody can be kept out, and states that other hardware computed may be other bytes. A
writer there overwrites, deletes nothing that a rival may have committed, and looks after its own
commit at what stands: if that is not whole, it writes again. Whoever changes a shard last has
looked at it last, so when all have returned one of their versions stands, whole.
"""

import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from storage.arrays import Write
from storage.directory import Directory
from storage.errors import (
    CorruptError,
    SampleRefusedError,
    ShardCorruptError,
    ShardMissingError,
    TransientError,
)
from storage.identity import StoreIdentity
from storage.plan import PlannedShard
from storage.probe import ProbePoint, require_probe
from storage.reader import read_record
from storage.recompute import Recompute
from storage.record import CommitRecord, ObjectDigest, RunningDigest
from storage.samples import StoredSample, require_storable
from storage.shard import raw_bytes, write_arrays
from storage.verify import check_meaning, check_sizes, read_objects

ROUNDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenObject:
    """What one object was when this writer wrote it."""

    digest: ObjectDigest
    tag: str | None
    """What the place called these bytes, so that they need not be read to be recognised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWriter:
    """Writes the shards of one store."""

    root: Directory
    identity: StoreIdentity

    def write(
        self,
        shard: PlannedShard,
        samples: Iterable[StoredSample],
        probe: Sequence[ProbePoint],
        recompute: Recompute | None,
    ) -> CommitRecord:
        """Write a shard and commit it; see `Store.write_shard`."""
        with self.root.exclusive(f"shards/{shard.shard_id}"):
            committed = self._committed(shard.shard_id)
            if committed is not None and self._reproduces(committed, probe, recompute):
                return committed
            if self.root.is_local:
                self.revoke(shard.shard_id)
                self._sweep(shard.shard_id)
            ordered = self._checked(shard, samples)
            by_id = {sample.sample_id: sample for sample in ordered}
            require_probe(probe, by_id, self.identity)
            if self.root.is_local:
                return self._write_alone(shard, ordered, probe, recompute)
            return self._write_among_rivals(shard, ordered, probe, recompute)

    def revoke(self, shard_id: str) -> None:
        """Take back a shard's commit record."""
        self.root.delete(f"commits/{shard_id}.json")

    def _write_alone(
        self,
        shard: PlannedShard,
        samples: Sequence[StoredSample],
        probe: Sequence[ProbePoint],
        recompute: Recompute | None,
    ) -> CommitRecord:
        try:
            record = self._record_of(shard, samples, probe, self._write_objects(shard, samples))
            if not self._reproduces(record, probe, recompute):
                raise ShardCorruptError(
                    f"shard {shard.shard_id} does not read back as it was written; it is not "
                    "committed. This machine's memory or disk fails, perhaps"
                )
            self._commit(record)
        except Exception:  # whatever the target raised while it read the states again, too
            self.revoke(shard.shard_id)
            self._sweep(shard.shard_id)  # gives back the space; without a record it is no shard
            raise
        return record

    def _write_among_rivals(
        self,
        shard: PlannedShard,
        samples: Sequence[StoredSample],
        probe: Sequence[ProbePoint],
        recompute: Recompute | None,
    ) -> CommitRecord:
        committed = self._committed(shard.shard_id)  # perhaps while the samples were computed
        if committed is not None and self._reproduces(committed, probe, recompute):
            return committed
        for attempt in range(ROUNDS):
            began = time.monotonic()
            written = self._write_objects(shard, samples)
            self._sweep(shard.shard_id, keep=written)
            record = self._record_of(shard, samples, probe, written)
            # Else a rival has written already: there is nothing to commit, or to take back.
            if self._reproduces(record, probe, recompute):
                self._commit(record)
            longest_pause = (time.monotonic() - began) * 2**attempt
            for pause in (0.0, random.uniform(0, longest_pause)):  # noqa: S311 - no secret
                time.sleep(pause)  # leave the field to one rival, or else write at the same time
                standing = self._standing(shard.shard_id, written)
                if standing is not None and (
                    standing == record or self._reproduces(standing, probe, recompute)
                ):
                    return standing
        raise TransientError(
            f"shard {shard.shard_id} was changed by other writers {ROUNDS} times while it was "
            "written; end all runs on this store but one, then run the same command again"
        )

    def _write_objects(
        self, shard: PlannedShard, samples: Sequence[StoredSample]
    ) -> Mapping[str, WrittenObject]:
        prefix = f"shards/{shard.shard_id}"
        written: dict[str, WrittenObject] = {}

        @contextmanager
        def open_object(key: str) -> Iterator[Write]:
            digest = RunningDigest()
            with self.root.open(f"{prefix}/{key}") as pieces:

                def write(data: bytes) -> None:
                    pieces.write(data)
                    digest.update(data)

                yield write
            written[key] = WrittenObject(digest=digest.value(), tag=pieces.tag)

        write_arrays(shard.shard_id, samples, self.identity, open_object)
        self.root.flush(prefix)
        return written

    def _record_of(
        self,
        shard: PlannedShard,
        samples: Sequence[StoredSample],
        probe: Sequence[ProbePoint],
        written: Mapping[str, WrittenObject],
    ) -> CommitRecord:
        return CommitRecord(
            shard_id=shard.shard_id,
            identity_id=self.identity.identity_id,
            sample_ids=shard.sample_ids,
            sample_tokens=tuple(len(sample) for sample in samples),
            sample_supervised=tuple(int(sample.loss_mask.sum()) for sample in samples),
            raw_bytes=raw_bytes(samples),
            objects={key: found.digest for key, found in written.items()},
            probe=tuple(probe),
        )

    def _commit(self, record: CommitRecord) -> None:
        self.root.publish(f"commits/{record.shard_id}.json", record.to_json())

    def _reproduces(
        self, record: CommitRecord, probe: Sequence[ProbePoint], recompute: Recompute | None
    ) -> bool:
        """Tell whether the stored bytes are those of the record and say what its probe holds.

        False where they are other bytes: damage on a disk, a rival's elsewhere. States that the
        store leaves out must be recomputed bit for bit if `probe`, what the target said here, is
        that of the record. A rival's may come from other hardware: its last bits may differ from
        those computed here.

        Raises:
            ShardCorruptError: they are the record's bytes and say something else. No record of them
                is left.

        """
        if recompute is None:
            return True
        objects, damaged = read_objects(self.root, record)
        if damaged:
            return False
        is_from_here = set(record.probe) == set(probe)
        found = check_meaning(record, objects, self.identity, recompute, exact=is_from_here)
        first = next(iter(found), None)
        if first is None:
            return True
        if self._is_committed(record):
            self.revoke(record.shard_id)
        raise ShardCorruptError(
            f"shard {record.shard_id} was stored and does not read back as what the target said: "
            f"{first.object_key}: {first.problem}. It is not committed; run the same command "
            "again. If that ends the same way, the states are captured wrongly (layer, norm, a "
            "head with a bias), layers of this target cannot be run alone (set store.recompute to "
            "false), or this machine's memory or disk fails"
        )

    def _is_committed(self, record: CommitRecord) -> bool:
        try:
            return self._record(record.shard_id) == record
        except (ShardMissingError, CorruptError):
            return False

    def _committed(self, shard_id: str) -> CommitRecord | None:
        """Return the record if all its objects have their sizes; take back one that is damaged.

        Left standing, it could fit sizes of objects that a kill left half rewritten.
        """
        try:
            record = self._record(shard_id)
        except ShardMissingError:
            return None
        except CorruptError:
            self.revoke(shard_id)
            return None
        if any(check_sizes(self.root, record)):
            self.revoke(shard_id)
            return None
        return record

    def _standing(self, shard_id: str, written: Mapping[str, WrittenObject]) -> CommitRecord | None:
        """Return the record that stands, a rival's perhaps, if every byte is what it says.

        Objects that are still as this writer wrote them are recognised by their tags; others, and
        all where the place has no tags, are read.
        """
        try:
            record = self._record(shard_id)
        except ShardMissingError:
            return None
        prefix = f"shards/{shard_id}"
        tags = self.root.tags(prefix)
        for key, expected in record.objects.items():
            mine = written.get(key)
            if mine and mine.digest == expected and mine.tag and mine.tag == tags.get(key):
                continue
            try:
                found = ObjectDigest.of(self.root.read(f"{prefix}/{key}"))
            except FileNotFoundError:
                return None
            if found != expected:
                return None
        return record

    def _record(self, shard_id: str) -> CommitRecord:
        return read_record(self.root, shard_id, identity_id=self.identity.identity_id)

    def _sweep(self, shard_id: str, *, keep: Collection[str] = ()) -> None:
        """Remove what earlier attempts left behind, but for the keys to keep."""
        prefix = f"shards/{shard_id}"
        for key in self.root.sizes(prefix).keys() - set(keep):
            self.root.delete(f"{prefix}/{key}")

    def _checked(
        self, shard: PlannedShard, samples: Iterable[StoredSample]
    ) -> Sequence[StoredSample]:
        by_id: dict[str, StoredSample] = {}
        for sample in samples:
            require_storable(sample, self.identity)
            by_id[sample.sample_id] = sample
        if by_id.keys() != set(shard.sample_ids):
            missing = sorted(set(shard.sample_ids) - by_id.keys())
            foreign = sorted(by_id.keys() - set(shard.sample_ids))
            raise SampleRefusedError(
                f"shard {shard.shard_id} was handed the wrong samples: {len(missing)} missing "
                f"{missing[:1]}, {len(foreign)} not planned {foreign[:1]}"
            )
        return [by_id[sample_id] for sample_id in shard.sample_ids]
