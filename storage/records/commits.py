"""The committed shards of a store at one moment: single records, and rows of manifests.

Records are built on access and samples are columns: a store of a million shards takes no more
memory than opening needs.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.objects.digests import ObjectDigest
from storage.records.commit_record import CommitRecord
from storage.records.manifest import Manifest
from storage.records.plan import PlannedSample
from storage.records.sample_rows import SampleRows, Wanted, ids_of, names_of

SAMPLES_AT_A_TIME = 4 << 20
"""Wanted samples per pass over all committed ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Totals over all shards of a store."""

    num_shards: int
    num_samples: int
    num_tokens: int
    num_supervised: int
    raw_bytes: int
    stored_bytes: int
    num_probed: int
    """Shards that hold a semantic probe."""
    largest_raw_bytes: int
    """`raw_bytes` of the largest shard."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Part:
    """A manifest, and which of its rows count."""

    manifest: Manifest
    keep: NDArray[np.bool_]


class Commits(Mapping[str, CommitRecord]):
    """The committed shards at one moment, by id; records are built on access."""

    def __init__(
        self,
        newer: Mapping[str, CommitRecord],
        parts: Sequence[Part] = (),
        excluded: Collection[str] = (),
    ) -> None:
        """Use `CommitLog.read` instead, or view a mapping of records."""
        self._newer = newer
        self._parts = parts
        self.excluded = frozenset(excluded)
        """Ids of excluded samples (`storage.records.exclusions`)."""
        self._samples: tuple[Manifest, pa.Table] | None = None

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self._newer) + sum(int(part.keep.sum()) for part in self._parts)

    def __iter__(self) -> Iterator[str]:
        """Yield all shard ids, grouped by manifest."""
        yield from self._newer
        for part in self._parts:
            yield from names_of(part.manifest.shard_ids[part.keep])

    def __contains__(self, shard_id: object) -> bool:
        """Return whether a shard is committed; reads nothing."""
        return isinstance(shard_id, str) and (
            shard_id in self._newer or self._row(shard_id) is not None
        )

    def __getitem__(self, shard_id: str) -> CommitRecord:
        """Return a whole record; a manifest's samples are read, and cached until the next one.

        So access to all records, in the order of iteration, reads each manifest once.
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
        """Return the committed digests of a shard's objects; KeyError if it is not committed."""
        if shard_id in self._newer:
            return self._newer[shard_id].objects
        found = self._row(shard_id)
        if found is None:
            raise KeyError(shard_id)
        manifest, row = found
        return manifest.objects_at(row)

    def holds(self, sample_ids: Sequence[str]) -> NDArray[np.bool_]:
        """Return [M] whether each sample is committed; memory use grows with these only."""
        return Wanted(sample_ids).found_in(rows.sample_ids for rows in self.sample_rows())

    def held(self, sample_ids: Collection[str]) -> set[str]:
        """Return the given samples that are committed."""
        names = list(sample_ids)
        return {name for name, is_held in zip(names, self.holds(names), strict=True) if is_held}

    def usable(self, sample_ids: Iterable[str]) -> list[str]:
        """Return the given samples that are not excluded, in order."""
        return [name for name in sample_ids if name not in self.excluded]

    def lacks(self, samples: Iterable[PlannedSample]) -> Iterator[PlannedSample]:
        """Yield the given samples, of any number, that are still to be generated, in order."""
        usable = (sample for sample in samples if sample.sample_id not in self.excluded)
        while block := list(islice(usable, SAMPLES_AT_A_TIME)):
            held = self.holds([sample.sample_id for sample in block])
            yield from (sample for sample, is_held in zip(block, held, strict=True) if not is_held)

    def sample_rows(self) -> Iterator[SampleRows]:
        """Yield the samples of all shards, one manifest at a time."""
        if self._newer:
            yield _rows_of([self._newer[name] for name in sorted(self._newer)])
        for part in self._parts:
            yield part.manifest.sample_rows(part.keep)

    @property
    def totals(self) -> Totals:
        """Totals over all shards; reads no samples."""
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


def _rows_of(records: Sequence[CommitRecord]) -> SampleRows:
    counts = [len(record.sample_ids) for record in records]
    return SampleRows(
        shard_ids=ids_of([record.shard_id for record in records]),
        shards=np.repeat(np.arange(len(records)), counts),
        sample_ids=ids_of([name for record in records for name in record.sample_ids]),
        tokens=np.array([n for record in records for n in record.sample_tokens], np.int32),
        supervised=np.array([n for record in records for n in record.sample_supervised], np.int32),
    )
