"""The committed shards of a store: single records, and manifests of many.

A record is first written alone (`commits/<shard_id>.json`). When there are many, they are also
written to a manifest (`storage.records.compaction`); the single records are removed once that
manifest has existed for a while. A single record takes precedence over a row of a manifest: it is
newer. `revoked/<shard_id>/<record_id>.json` revokes a row, since manifests never change.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.errors import REPAIR, CorruptError, ShardMissingError, TransientError
from storage.objects.digests import ObjectDigest
from storage.objects.object_store import ObjectStore
from storage.objects.sealed_json import seal
from storage.records import keys
from storage.records.commit_record import CommitRecord
from storage.records.commits import Commits, Part
from storage.records.exclusions import Exclusions
from storage.records.identity import FORMAT_VERSION
from storage.records.manifest import Manifest, manifest_ids, record_id
from storage.records.sample_rows import ids_of, is_id, names_of

Result = TypeVar("Result")

PAUSES_SECONDS = (0.0, 0.1, 0.5, 2.0, 5.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The records at one moment: single ones are listed before manifests they may move to."""

    records: Sequence[str]
    """Ids of the shards that have a single record, sorted."""
    manifest_ids: Sequence[str]
    revoked: Collection[tuple[str, str]]
    """(shard id, record id)"""

    @classmethod
    def of(cls, root: ObjectStore) -> "Listing":
        """List the records below the root of a store."""
        names = (keys.without(key, keys.JSON_SUFFIX) for key in root.sizes(keys.RECORDS))
        records = sorted(name for name in names if name is not None and is_id(name))
        manifests = manifest_ids(root)
        revoked = revocations(root) if manifests else ()
        return cls(records=records, manifest_ids=manifests, revoked=revoked)


class CommitLog:
    """The commit records of one store."""

    def __init__(self, root: ObjectStore, identity_id: str) -> None:
        """Read and write below the root of a store."""
        self.root = root
        self.identity_id = identity_id
        self.exclusions = Exclusions(root)
        self._manifests: dict[str, Manifest] = {}
        self._last: tuple[Manifest, Commits] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["CommitLog"], tuple[ObjectStore, str]]:
        """Pickle without the cached manifests."""
        return CommitLog, (self.root, self.identity_id)

    # ---- reading

    def ids(self) -> Sequence[str]:
        """Return the ids of all committed shards, sorted; no record is read."""
        return self.consistently(self._ids)

    def _ids(self) -> Sequence[str]:
        listing = Listing.of(self.root)
        found = set(listing.records)
        for part in self.parts(listing, found):
            found.update(names_of(part.manifest.shard_ids[part.keep]))
        return sorted(found)

    def read(self) -> Commits:
        """Return all committed shards; CorruptError if a record or a manifest is damaged."""
        return self.consistently(self._read)

    def _read(self) -> Commits:
        listing = Listing.of(self.root)
        newer = self.alone(listing.records)
        return Commits(newer, self.parts(listing, newer), self.exclusions.sample_ids())

    def read_what_is_sound(self) -> tuple[Commits, Mapping[str, CorruptError]]:
        """Return the committed shards with a valid record, and the errors of others by shard id.

        Raises:
            CorruptError: both copies of a manifest are damaged.

        """
        with suppress(CorruptError):  # else read one by one to find the damaged ones
            return self.read(), {}
        damaged: dict[str, CorruptError] = {}

        def read() -> Commits:
            damaged.clear()
            listing = Listing.of(self.root)
            newer: dict[str, CommitRecord] = {}
            for shard_id in listing.records:
                try:
                    newer[shard_id] = self.alone([shard_id])[shard_id]
                except CorruptError as error:
                    damaged[shard_id] = error
            parts = self.parts(listing, listing.records)
            return Commits(newer, parts, self.exclusions.sample_ids())

        return self.consistently(read), damaged

    def find(self, shard_id: str) -> CommitRecord:
        """Return the record of one shard.

        Raises:
            ShardMissingError: there is none.
            CorruptError: it is damaged.

        """
        with suppress(FileNotFoundError):
            return self.alone([shard_id])[shard_id]
        return self.consistently(lambda: self._in_manifests(shard_id)[shard_id])

    def objects(self, shard_id: str) -> Mapping[str, ObjectDigest]:
        """Return the committed digests of a shard's objects; raises the errors of `find`."""
        with suppress(FileNotFoundError):
            return self.alone([shard_id])[shard_id].objects
        return self.consistently(lambda: self._in_manifests(shard_id).objects(shard_id))

    def some(self, shard_ids: Iterable[str]) -> Mapping[str, CommitRecord]:
        """Return the records of some shards by id; raises the errors of `find`."""
        wanted = list(shard_ids)
        found = self.alone(wanted, absent_ok=True)
        return {name: found[name] if name in found else self.find(name) for name in wanted}

    def drop_cached(self) -> None:
        """Drop the cached manifests; the next lookup reads them again."""
        with self._lock:
            self._manifests.clear()
            self._last = None

    def _in_manifests(self, shard_id: str) -> Commits:
        """Return the rows of a manifest, cached or new, in which the shard's row still counts."""
        revoked: set[str] | None = None
        for manifest in chain(self._cached(), self._listed()):
            name = manifest.record_id_of(shard_id)
            if name is None:
                continue
            revoked = self._revoked_of(shard_id) if revoked is None else revoked
            if name not in revoked:
                return self._rows_of(manifest)
        raise ShardMissingError(f"shard {shard_id} has no commit record; {REPAIR}")

    def _rows_of(self, manifest: Manifest) -> Commits:
        """Return all rows of a manifest; the last ones are cached, with the samples they have read.

        So reading one record after another reads the samples once.
        """
        with self._lock:
            if self._last is None or self._last[0] is not manifest:
                keep = np.ones(len(manifest.shard_ids), np.bool_)
                self._last = (manifest, Commits({}, [Part(manifest=manifest, keep=keep)]))
            return self._last[1]

    def _cached(self) -> Sequence[Manifest]:
        with self._lock:
            return list(self._manifests.values())

    def _listed(self) -> Iterator[Manifest]:
        yield from self._loaded(manifest_ids(self.root))

    def _loaded(self, names: Sequence[str]) -> Sequence[Manifest]:
        """Return manifests, reading those that are not cached."""
        with self._lock:
            for gone in self._manifests.keys() - set(names):
                del self._manifests[gone]
            for name in names:
                if name not in self._manifests:
                    self._manifests[name] = Manifest.read(
                        self.root, name, identity_id=self.identity_id
                    )
            return [self._manifests[name] for name in names]

    def _revoked_of(self, shard_id: str) -> set[str]:
        return {
            key.removesuffix(keys.JSON_SUFFIX)
            for key in self.root.sizes(f"{keys.REVOCATIONS}/{shard_id}")
        }

    def alone(
        self, shard_ids: Sequence[str], *, absent_ok: bool = False
    ) -> dict[str, CommitRecord]:
        """Return single records by id; FileNotFoundError if one is absent, unless `absent_ok`."""
        by_key = {keys.record(shard_id): shard_id for shard_id in shard_ids}
        return {
            by_key[key]: CommitRecord.from_json(
                data, shard_id=by_key[key], identity_id=self.identity_id
            )
            for key, data in self.root.read_many(list(by_key), absent_ok=absent_ok).items()
        }

    def parts(self, listing: Listing, newer: Collection[str]) -> Sequence[Part]:
        """Return the manifests, with the one row per shard that counts."""
        manifests = sorted(  # a row that was merged into a larger one counts there
            self._loaded(listing.manifest_ids), key=lambda one: -len(one.shard_ids)
        )
        if not manifests:
            return []
        keep = [~_among(manifest.shard_ids, newer) for manifest in manifests]
        if listing.revoked:
            shard_ids, record_ids = (ids_of(names) for names in zip(*listing.revoked, strict=True))
            for manifest, counts in zip(manifests, keep, strict=True):
                rows = np.searchsorted(manifest.shard_ids, shard_ids)
                counts[rows[manifest.has(shard_ids, record_ids)]] = False
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
            Part(manifest=one, keep=counts) for one, counts in zip(manifests, keep, strict=True)
        ]

    def consistently(self, read: Callable[[], Result]) -> Result:
        """Read again if a record moved to a manifest, or a manifest to another, meanwhile.

        Raises:
            TransientError: they move faster than they can be read.

        """
        for pause in PAUSES_SECONDS:
            try:
                return read()
            except FileNotFoundError as error:
                moved = error
            self.drop_cached()
            time.sleep(pause)
        raise TransientError(
            f"{moved}, although it was listed a moment ago; is this host's view of a shared disk "
            "stale? Run the same command again"
        )

    # ---- writing

    def create(self, record: CommitRecord) -> bool:
        """Commit a shard unless it has a single record; return whether it had none."""
        return self.root.create(keys.record(record.shard_id), record.to_json())

    def replace(self, record: CommitRecord) -> None:
        """Commit a shard in place of a damaged record, or of one with damaged data."""
        self.root.publish(keys.record(record.shard_id), record.to_json())

    def revoke(self, shard_id: str) -> None:
        """Revoke every record of a shard.

        Its single record gets a revocation, too, since it may be moving to a manifest.
        """
        for manifest in self.manifests():  # first, or a kill would let an older row count
            name = manifest.record_id_of(shard_id)
            if name is not None:
                self.revoke_row(shard_id, name)
        with suppress(FileNotFoundError, CorruptError):
            self.revoke_row(shard_id, record_id(self.alone([shard_id])[shard_id]))
        self.root.delete(keys.record(shard_id))

    def revoke_row(self, shard_id: str, name: str) -> None:
        """Revoke a row of a manifest, or a record that may become one."""
        document = {"format_version": FORMAT_VERSION, "record_id": name, "shard_id": shard_id}
        self.root.publish(keys.revocation(shard_id, name), seal(document))

    def compacted(self) -> frozenset[str]:
        """Return the shards that are in a manifest."""
        parts = self.consistently(lambda: self.parts(Listing.of(self.root), ()))
        return frozenset(
            name for part in parts for name in names_of(part.manifest.shard_ids[part.keep])
        )

    def manifests(self) -> Sequence[Manifest]:
        """Return all manifests; CorruptError if both copies of one are damaged."""
        return self.consistently(lambda: self._loaded(manifest_ids(self.root)))


def revocations(root: ObjectStore) -> Collection[tuple[str, str]]:
    """Return (shard id, record id) of every row of a manifest that was revoked."""
    parts = (key.removesuffix(keys.JSON_SUFFIX).split("/") for key in root.sizes(keys.REVOCATIONS))
    return {(part[0], part[1]) for part in parts if len(part) == 2 and all(map(is_id, part))}


def _among(ids: NDArray[np.bytes_], names: Collection[str]) -> NDArray[np.bool_]:
    """Return [N] whether each id is in `names`."""
    if not names:
        return np.zeros(len(ids), np.bool_)
    few = np.sort(ids_of(names))
    at = np.minimum(np.searchsorted(few, ids), len(few) - 1)
    found: NDArray[np.bool_] = few[at] == ids
    return found
