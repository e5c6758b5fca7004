"""Which shards a store has committed: single records, and manifests of many.

A record is written alone (`commits/<shard_id>.json`). When there are many, they are put into a
manifest as well and, once that has been there for a while, removed; so a store opens with a few
reads however many shards it has. A single record counts more than a row of a manifest: it is newer.
A row is taken back by `revoked/<shard_id>/<record_id>.json`, since manifests never change.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.canonical import seal
from storage.directory import Directory
from storage.errors import CorruptError, ShardMissingError
from storage.identity import FORMAT_VERSION
from storage.listing import Entry
from storage.manifest import FOLDER as MANIFESTS
from storage.manifest import (
    KINDS,
    Manifest,
    delete_manifest,
    keys_of,
    manifest_ids,
    record_id,
)
from storage.plan import PlannedSample
from storage.record import CommitRecord, ObjectDigest
from storage.sample_rows import SampleRows, Wanted, ids_of, is_id, names_of
from storage.verify import REPAIR

Result = TypeVar("Result")

RECORDS, REVOKED = "commits", "revoked"
_SUFFIX = ".json"
COMPACT_FROM = 1000
"""Single records from which on a manifest is worth its files."""
MOST_SHARDS = 50_000
"""In a manifest that others are merged into."""
SETTLE_SECONDS = 3600.0
"""A record stays beside the manifest that has it, for whoever lists the one and not yet the other.
"""
TRIES = 5
SAMPLES_AT_A_TIME = 4 << 20
"""Wanted samples for which all that are committed are gone through once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What all shards of a store have together."""

    num_shards: int
    num_samples: int
    num_tokens: int
    num_supervised: int
    raw_bytes: int
    stored_bytes: int
    num_probed: int
    """Shards that hold a semantic probe."""
    largest_raw_bytes: int
    """Of one shard."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Part:
    """A manifest, and which of its rows count."""

    manifest: Manifest
    keep: NDArray[np.bool_]


class Commits(Mapping[str, CommitRecord]):
    """The committed shards at one moment, by id; records are made when they are asked for."""

    def __init__(self, newer: Mapping[str, CommitRecord], parts: Sequence[_Part] = ()) -> None:
        """Use `CommitLog.read`; of a mapping of records, this is a view."""
        self._newer = newer
        self._parts = parts
        self._samples: tuple[Manifest, pa.Table] | None = None

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self._newer) + sum(int(part.keep.sum()) for part in self._parts)

    def __iter__(self) -> Iterator[str]:
        """Yield all shard ids, those of a manifest one after the other."""
        yield from self._newer
        for part in self._parts:
            yield from names_of(part.manifest.shard_ids[part.keep])

    def __contains__(self, shard_id: object) -> bool:
        """Tell whether a shard is committed; nothing is read."""
        return isinstance(shard_id, str) and (
            shard_id in self._newer or self._row(shard_id) is not None
        )

    def __getitem__(self, shard_id: str) -> CommitRecord:
        """Return a whole record; of a manifest the samples are read, and kept until the next one.

        So all of them, in the order of iteration, take one reading of each manifest.
        """
        if shard_id in self._newer:
            return self._newer[shard_id]
        found = self._row(shard_id)
        if found is None:
            raise KeyError(shard_id)
        manifest, row = found
        if self._samples is None or self._samples[0] is not manifest:
            self._samples = (manifest, manifest.samples())
        return manifest.record(row, self._samples[1])

    def objects(self, shard_id: str) -> Mapping[str, ObjectDigest]:
        """Return what the objects of a shard must be; KeyError if it is not committed."""
        if shard_id in self._newer:
            return self._newer[shard_id].objects
        found = self._row(shard_id)
        if found is None:
            raise KeyError(shard_id)
        manifest, row = found
        return manifest.objects_at(row)

    def holds(self, sample_ids: Sequence[str]) -> NDArray[np.bool_]:
        """Return [M] which of some samples are committed, in memory for them alone."""
        wanted = Wanted(sample_ids)
        found = np.zeros(len(wanted), np.bool_)
        for rows in self.sample_rows():
            for _, at in wanted.find(rows.sample_ids):
                found[at] = True
        each: NDArray[np.bool_] = found[wanted.places]
        return each

    def held(self, sample_ids: Collection[str]) -> set[str]:
        """Return those of some samples that are committed."""
        names = list(sample_ids)
        return {name for name, is_held in zip(names, self.holds(names), strict=True) if is_held}

    def lacks(self, samples: Iterable[PlannedSample]) -> Iterator[PlannedSample]:
        """Yield those of any number of samples that are not committed, in order."""
        left = iter(samples)
        while block := list(islice(left, SAMPLES_AT_A_TIME)):
            held = self.holds([sample.sample_id for sample in block])
            yield from (sample for sample, is_held in zip(block, held, strict=True) if not is_held)

    def sample_rows(self) -> Iterator[SampleRows]:
        """Yield the samples of all shards, those of a manifest at a time."""
        if self._newer:
            yield _rows_of([self._newer[name] for name in sorted(self._newer)])
        for part in self._parts:
            yield part.manifest.sample_rows(part.keep)

    @property
    def totals(self) -> Totals:
        """What all shards have together; no sample is read."""
        newer = list(self._newer.values())
        parts = [(part.manifest, part.keep) for part in self._parts]

        def total(name: str, alone: Iterable[int]) -> int:
            return sum(alone) + sum(int(getattr(one, name)[keep].sum()) for one, keep in parts)

        return Totals(
            num_shards=len(self),
            num_samples=total("num_samples", (len(one.sample_ids) for one in newer)),
            num_tokens=total("num_tokens", (one.num_tokens for one in newer)),
            num_supervised=total("num_supervised", (one.num_supervised for one in newer)),
            raw_bytes=total("raw_bytes", (one.raw_bytes for one in newer)),
            stored_bytes=total("stored_bytes", (one.stored_bytes for one in newer)),
            num_probed=sum(bool(one.probe) for one in newer)
            + sum(int((one.num_probed[keep] > 0).sum()) for one, keep in parts),
            largest_raw_bytes=max(
                [
                    *(one.raw_bytes for one in newer),
                    *(int(one.raw_bytes[keep].max(initial=0)) for one, keep in parts),
                ],
                default=0,
            ),
        )

    def _row(self, shard_id: str) -> tuple[Manifest, int] | None:
        for part in self._parts:
            row = part.manifest.row(shard_id)
            if row is not None and part.keep[row]:
                return part.manifest, row
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """What lies in a store at one moment; single records before the manifests they may move to."""

    records: Mapping[str, Entry]
    manifest_ids: Sequence[str]
    revoked: Collection[tuple[str, str]]

    @classmethod
    def of(cls, root: Directory) -> "_Listing":
        records = {
            key.removesuffix(_SUFFIX): entry
            for key, entry in root.entries(RECORDS).items()
            if key.endswith(_SUFFIX) and is_id(key.removesuffix(_SUFFIX))
        }
        manifests = manifest_ids(root)
        revoked = revocations(root) if manifests else ()
        return cls(records=records, manifest_ids=manifests, revoked=revoked)


class CommitLog:
    """The commit records of one store."""

    def __init__(self, root: Directory, identity_id: str) -> None:
        """Read and write below the root of a store."""
        self.root = root
        self._identity_id = identity_id
        self._manifests: dict[str, Manifest] = {}

    def __reduce__(self) -> tuple[type["CommitLog"], tuple[Directory, str]]:
        """Travel without what was read."""
        return CommitLog, (self.root, self._identity_id)

    # ---- reading

    def ids(self) -> Sequence[str]:
        """Return the ids of all committed shards, sorted; no record is read."""
        return self._consistently(self._ids)

    def _ids(self) -> Sequence[str]:
        listing = _Listing.of(self.root)
        found = set(listing.records)
        for part in self._parts(listing, found):
            found.update(names_of(part.manifest.shard_ids[part.keep]))
        return sorted(found)

    def read(self) -> Commits:
        """Return all that is committed; CorruptError if a record or a manifest is damaged."""
        return self._consistently(self._read)

    def _read(self) -> Commits:
        listing = _Listing.of(self.root)
        newer = self._alone(sorted(listing.records))
        return Commits(newer, self._parts(listing, newer))

    def read_what_is_sound(self) -> tuple[Commits, Mapping[str, CorruptError]]:
        """Return all that is committed and parses, and what does not by shard id.

        Raises:
            CorruptError: both copies of a manifest are damaged.

        """
        with suppress(CorruptError):  # which of them is damaged is found one by one
            return self.read(), {}
        damaged: dict[str, CorruptError] = {}

        def read() -> Commits:
            damaged.clear()
            listing = _Listing.of(self.root)
            newer: dict[str, CommitRecord] = {}
            for shard_id in sorted(listing.records):
                try:
                    newer[shard_id] = self._alone([shard_id])[shard_id]
                except CorruptError as error:
                    damaged[shard_id] = error
            return Commits(newer, self._parts(listing, listing.records))

        return self._consistently(read), damaged

    def find(self, shard_id: str) -> CommitRecord:
        """Return the record of one shard.

        Raises:
            ShardMissingError: there is none.
            CorruptError: it is damaged.

        """
        with suppress(FileNotFoundError):
            return self._alone([shard_id])[shard_id]
        return self._in_manifests(shard_id)[shard_id]

    def objects(self, shard_id: str) -> Mapping[str, ObjectDigest]:
        """Return what the objects of one shard must be; raises what `find` does."""
        with suppress(FileNotFoundError):
            return self._alone([shard_id])[shard_id].objects
        return self._in_manifests(shard_id).objects(shard_id)

    def some(self, shard_ids: Iterable[str]) -> Mapping[str, CommitRecord]:
        """Return the records of some shards by id; raises what `find` does."""
        wanted = list(shard_ids)
        try:
            return self._alone(wanted)
        except FileNotFoundError:
            return {shard_id: self.find(shard_id) for shard_id in wanted}

    def _in_manifests(self, shard_id: str) -> Commits:
        """Return manifests that have a shard, perhaps known from before, whose rows still count."""

        def look() -> Commits:
            known = [part for part in self._cached() if part.manifest.row(shard_id) is not None]
            for part in known or self._parts(_Listing.of(self.root), ()):
                row = part.manifest.row(shard_id)
                if row is None:
                    continue
                if part.manifest.record_id_at(row) not in self._revoked_of(shard_id):
                    return Commits({}, [part])
            raise ShardMissingError(f"shard {shard_id} has no commit record; {REPAIR}")

        return self._consistently(look)

    def _cached(self) -> Iterator[_Part]:
        for manifest in self._manifests.values():
            yield _Part(manifest=manifest, keep=np.ones(len(manifest.shard_ids), np.bool_))

    def _revoked_of(self, shard_id: str) -> set[str]:
        return {key.removesuffix(_SUFFIX) for key in self.root.sizes(f"{REVOKED}/{shard_id}")}

    def _alone(self, shard_ids: Sequence[str]) -> dict[str, CommitRecord]:
        keys = {_key(shard_id): shard_id for shard_id in shard_ids}
        return {
            keys[key]: CommitRecord.from_json(
                data, shard_id=keys[key], identity_id=self._identity_id
            )
            for key, data in self.root.read_many(list(keys)).items()
        }

    def _parts(self, listing: _Listing, newer: Collection[str]) -> Sequence[_Part]:
        """Return the manifests, and of each shard the one row that counts."""
        for gone in self._manifests.keys() - set(listing.manifest_ids):
            del self._manifests[gone]
        for manifest_id in listing.manifest_ids:
            if manifest_id not in self._manifests:
                self._manifests[manifest_id] = Manifest.read(
                    self.root, manifest_id, identity_id=self._identity_id
                )
        manifests = [self._manifests[manifest_id] for manifest_id in listing.manifest_ids]
        if not manifests:
            return []
        keep = [~_among(manifest.shard_ids, newer) for manifest in manifests]
        for shard_id, name in listing.revoked:
            for manifest, counts in zip(manifests, keep, strict=True):
                row = manifest.row(shard_id)
                if row is not None and manifest.record_id_at(row) == name:
                    counts[row] = False
        left = np.concatenate(
            [one.shard_ids[counts] for one, counts in zip(manifests, keep, strict=True)]
        )
        first = np.zeros(len(left), np.bool_)
        first[np.unique(left, return_index=True)[1]] = True
        at = 0
        for counts in keep:
            num_left = int(counts.sum())
            counts[counts] = first[at : at + num_left]
            at += num_left
        return [
            _Part(manifest=one, keep=counts) for one, counts in zip(manifests, keep, strict=True)
        ]

    def _consistently(self, read: Callable[[], Result]) -> Result:
        """Read once more where a record moved to a manifest, or one to another, meanwhile."""
        for _ in range(TRIES - 1):
            with suppress(FileNotFoundError):
                return read()
        try:
            return read()
        except FileNotFoundError as error:
            raise ShardMissingError(f"{error}, though it is listed; {REPAIR}") from error

    # ---- writing

    def create(self, record: CommitRecord) -> bool:
        """Commit a shard unless it has a single record; return whether it had none."""
        return self.root.create(_key(record.shard_id), record.to_json())

    def replace(self, record: CommitRecord) -> None:
        """Commit a shard in place of a record that is damaged, or whose data is."""
        self.root.publish(_key(record.shard_id), record.to_json())

    def revoke(self, shard_id: str) -> None:
        """Take back whatever says that a shard is committed.

        Also its single record is named as revoked, since it may be on its way to a manifest.
        """
        with suppress(FileNotFoundError, CorruptError):
            self._revoke_row(shard_id, record_id(self._alone([shard_id])[shard_id]))
        self.root.delete(_key(shard_id))
        for manifest in self.manifests():
            name = manifest.record_id_of(shard_id)
            if name is not None:
                self._revoke_row(shard_id, name)

    def _revoke_row(self, shard_id: str, name: str) -> None:
        document = {"format_version": FORMAT_VERSION, "record_id": name, "shard_id": shard_id}
        self.root.publish(revocation_key(shard_id, name), seal(document))

    def complete_copies(self) -> None:
        """Write copies of manifests that a kill kept from being written."""
        manifests = self.manifests()
        there = {f"{MANIFESTS}/{key}" for key in self.root.sizes(MANIFESTS)} if manifests else set()
        for manifest in manifests:
            if not there.issuperset(
                key for kind in KINDS for key in keys_of(manifest.manifest_id, kind)
            ):
                manifest.mend()

    def compacted(self) -> frozenset[str]:
        """Return the shards that are in a manifest."""
        parts = self._consistently(lambda: self._parts(_Listing.of(self.root), ()))
        return frozenset(
            name for part in parts for name in names_of(part.manifest.shard_ids[part.keep])
        )

    def manifests(self) -> Sequence[Manifest]:
        """Return all manifests; CorruptError if both copies of one are damaged."""
        parts = self._consistently(lambda: self._parts(_Listing.of(self.root), ()))
        return [part.manifest for part in parts]

    def is_worth_compacting(self) -> bool:
        """Tell whether there are so many single records that `compact` has something to do."""
        return len(_Listing.of(self.root).records) >= COMPACT_FROM

    def compact(self) -> None:
        """Put single records into a manifest, and remove those that have been in one for a while.

        Safe at any moment beside others that read, write, revoke and compact.

        Raises:
            CorruptError: a record or a manifest is damaged.

        """
        records = self._there(sorted(_Listing.of(self.root).records))
        if len(records) < COMPACT_FROM:
            return
        parts = self._consistently(lambda: self._parts(_Listing.of(self.root), ()))
        written = self._written_at()
        fresh: list[CommitRecord] = []
        settled: list[CommitRecord] = []
        revoked = revocations(self.root)
        for record in records.values():
            name = record_id(record)
            if (record.shard_id, name) in revoked:
                continue  # a kill ended that half-way: as a row it would be lost
            there = [
                written[part.manifest.manifest_id]
                for part in parts
                if part.manifest.record_id_of(record.shard_id) == name
            ]
            if not there:
                fresh.append(record)
            elif min(there) < time.time() - SETTLE_SECONDS:
                settled.append(record)
        if len(fresh) >= COMPACT_FROM:
            self._put_together(fresh)
        still = self._there([one.shard_id for one in settled])
        gone = [one.shard_id for one in settled if still.get(one.shard_id) == one]
        self.root.delete_many([_key(shard_id) for shard_id in gone])

    def _there(self, shard_ids: Sequence[str]) -> Mapping[str, CommitRecord]:
        """Return those of some single records that are there."""
        with suppress(FileNotFoundError):
            return self._alone(shard_ids)
        found: dict[str, CommitRecord] = {}
        for shard_id in shard_ids:  # others compact, or revoke, at the same time
            with suppress(FileNotFoundError):
                found |= self._alone([shard_id])
        return found

    def _put_together(self, fresh: Sequence[CommitRecord]) -> None:
        """Write a manifest of single records and of smaller manifests, which are then removed."""
        records = {record.shard_id: record for record in fresh}
        parts = self._consistently(lambda: self._parts(_Listing.of(self.root), records))
        merged: list[Manifest] = []
        for part in sorted(parts, key=lambda part: int(part.keep.sum())):
            size = int(part.keep.sum())
            if size <= len(records) <= MOST_SHARDS - size:
                records.update(Commits({}, [part]))
                merged.append(part.manifest)
        everything = list(records.values())
        for first in range(0, len(everything), MOST_SHARDS):
            Manifest.write(
                self.root,
                everything[first : first + MOST_SHARDS],
                identity_id=self._identity_id,
            )
        for record in fresh:
            for part in parts:  # of a shard, one row counts when its single record is gone
                name = part.manifest.record_id_of(record.shard_id)
                if part.manifest not in merged and name not in (None, record_id(record)):
                    self._revoke_row(record.shard_id, str(name))
        for manifest in merged:
            delete_manifest(self.root, manifest.manifest_id)

    def _written_at(self) -> Mapping[str, float]:
        """Return when each manifest was written, by the clock of the place."""
        return {
            key.partition(".")[0]: entry.modified
            for key, entry in self.root.entries(MANIFESTS).items()
            if "/" not in key
        }


def revocations(root: Directory) -> Collection[tuple[str, str]]:
    """Return (shard id, record id) of every row of a manifest that was taken back."""
    parts = (key.removesuffix(_SUFFIX).split("/") for key in root.sizes(REVOKED))
    return {(part[0], part[1]) for part in parts if len(part) == 2 and is_id(part[0])}


def revocation_key(shard_id: str, name: str) -> str:
    """Return where it stands that a row was taken back."""
    return f"{REVOKED}/{shard_id}/{name}{_SUFFIX}"


def _key(shard_id: str) -> str:
    return f"{RECORDS}/{shard_id}{_SUFFIX}"


def _among(ids: NDArray[np.bytes_], names: Collection[str]) -> NDArray[np.bool_]:
    """Return [N] which of some ids are among a few others."""
    if not names:
        return np.zeros(len(ids), np.bool_)
    few = np.sort(ids_of(names))
    at = np.minimum(np.searchsorted(few, ids), len(few) - 1)
    found: NDArray[np.bool_] = few[at] == ids
    return found


def _rows_of(records: Sequence[CommitRecord]) -> SampleRows:
    counts = [len(record.sample_ids) for record in records]
    return SampleRows(
        shard_ids=ids_of([record.shard_id for record in records]),
        shards=np.repeat(np.arange(len(records)), counts),
        sample_ids=ids_of([name for record in records for name in record.sample_ids]),
        tokens=np.array([n for record in records for n in record.sample_tokens], np.int32),
        supervised=np.array([n for record in records for n in record.sample_supervised], np.int32),
    )
