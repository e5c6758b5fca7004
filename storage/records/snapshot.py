"""A snapshot: an immutable list of samples and their shards. Training refers to it by its id.

The id is the digest of the rows, not of the file: two stores that publish the same samples from the
same shards publish the same snapshot. Rows are sorted by shard, then by position in it.
"""

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from storage.errors import ConfigError, CorruptError
from storage.records.commits import Commits
from storage.records.identity import FORMAT_VERSION
from storage.records.sample_rows import ID_BYTES, Wanted, names_of

FORMAT_KEY = b"eyas_format_version"


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """N samples in S shards."""

    snapshot_id: str
    sample_ids: NDArray[np.void]
    """[N] 16 bytes each"""
    shard_ids: tuple[str, ...]
    """[S] sorted"""
    groups: NDArray[np.int64]
    """[N] index into `shard_ids`, non-decreasing"""
    positions: NDArray[np.int32]
    """[N] index of the sample in its shard"""
    lengths: NDArray[np.int64]
    """[N] tokens"""
    supervised: NDArray[np.int64]
    """[N] supervised tokens"""

    @property
    def num_samples(self) -> int:
        """Return N."""
        return len(self.groups)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens in all samples."""
        return int(self.lengths.sum())

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens in all samples."""
        return int(self.supervised.sum())

    @property
    def members(self) -> frozenset[bytes]:
        """Return the ids of all samples as bytes, 16 each; a new set each time."""
        return frozenset(self.sample_ids.tolist())

    def has_all(self, sample_ids: Collection[str]) -> bool:
        """Return whether it has all these samples; memory use grows with these only."""
        ids = self.sample_ids.view(f"S{ID_BYTES}")
        return bool(Wanted(sample_ids).found_in([ids]).all())

    def sample_id(self, index: int) -> str:
        """Return the id of sample `index`: 32 hex digits."""
        return bytes(self.sample_ids[index]).hex()

    @classmethod
    def of(cls, sample_ids: Collection[str], commits: Commits) -> Self:
        """Return the snapshot of these samples; raise ConfigError if one is not committed.

        A sample that several shards hold is taken from the shard with the smallest id.
        """
        if not sample_ids:
            raise ConfigError("a snapshot needs at least one sample; none was given")
        wanted = Wanted(sample_ids)
        num = len(wanted)
        shards = np.full(num, b"\xff" * ID_BYTES, f"S{ID_BYTES}")
        positions = np.full(num, -1, np.int32)
        lengths, supervised = np.zeros(num, np.int64), np.zeros(num, np.int64)
        for rows in commits.sample_rows():
            for many, ats in wanted.find(rows.sample_ids):
                smaller = rows.shard_ids[rows.shards[many]] < shards[ats]
                # Shard ids ascend: reversed, so that the smallest of a sample is written last.
                found, at = many[smaller][::-1], ats[smaller][::-1]
                shards[at] = rows.shard_ids[rows.shards[found]]
                positions[at] = rows.positions(found)
                lengths[at], supervised[at] = rows.tokens[found], rows.supervised[found]
        missing = wanted.sample_ids[positions < 0]
        if len(missing):
            raise ConfigError(
                f"{len(missing)} of {num} samples are in no committed shard, first "
                f"{names_of(missing[:1])[0]}: generate the missing ones, then publish again"
            )
        shard_ids, groups = np.unique(shards, return_inverse=True)
        order = np.lexsort((positions, groups))
        return cls._of_columns(
            sample_ids=wanted.sample_ids[order].view(f"V{ID_BYTES}"),
            shard_ids=names_of(shard_ids),
            groups=groups[order].astype(np.int64),
            positions=positions[order],
            lengths=lengths[order],
            supervised=supervised[order],
        )

    @classmethod
    def _of_columns(
        cls,
        *,
        sample_ids: NDArray[np.void],
        shard_ids: Sequence[str],
        groups: NDArray[np.int64],
        positions: NDArray[np.int32],
        lengths: NDArray[np.int64],
        supervised: NDArray[np.int64],
    ) -> Self:
        digest = xxhash.xxh3_128(bytes.fromhex("".join(shard_ids)))
        for column in (sample_ids, groups, positions, lengths, supervised):
            digest.update(np.ascontiguousarray(column).tobytes())
        return cls(
            snapshot_id=digest.hexdigest(),
            sample_ids=sample_ids,
            shard_ids=tuple(shard_ids),
            groups=groups,
            positions=positions,
            lengths=lengths,
            supervised=supervised,
        )

    def to_parquet(self) -> bytes:
        """Serialise as the content of `snapshots/<snapshot_id>.parquet`."""
        shard_column = pa.DictionaryArray.from_arrays(
            pa.array(self.groups.astype(np.int32)), pa.array(self.shard_ids)
        )
        id_column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(ID_BYTES),
            self.num_samples,
            [None, pa.py_buffer(np.ascontiguousarray(self.sample_ids).tobytes())],
        )
        table = pa.table(
            {
                "sample_id": id_column,
                "shard_id": shard_column,
                "position": pa.array(self.positions),
                "num_tokens": pa.array(self.lengths),
                "num_supervised": pa.array(self.supervised),
            }
        ).replace_schema_metadata({FORMAT_KEY: str(FORMAT_VERSION).encode()})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes, *, snapshot_id: str) -> Self:
        """Parse a snapshot; raise CorruptError unless its rows have this id."""
        what = f"snapshot {snapshot_id}"
        try:
            # No Arrow threads: one that still runs when Python exits aborts the process.
            file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["shard_id"])
            table = file.read(use_threads=False)
            snapshot = cls._of_table(table.combine_chunks())
        except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            raise CorruptError(f"{what} does not parse: {error}; publish it again") from error
        if snapshot.snapshot_id != snapshot_id:
            raise CorruptError(
                f"{what} holds the rows of snapshot {snapshot.snapshot_id}; publish it again"
            )
        return snapshot

    @classmethod
    def _of_table(cls, table: pa.Table) -> Self:
        ids = table["sample_id"].combine_chunks()
        shards = table["shard_id"].combine_chunks()
        first = ids.offset * ID_BYTES
        raw = np.frombuffer(ids.buffers()[1], dtype=np.uint8)[first : first + len(ids) * ID_BYTES]
        return cls._of_columns(
            sample_ids=raw.view(f"V{ID_BYTES}"),
            shard_ids=shards.dictionary.to_pylist(),
            groups=shards.indices.to_numpy().astype(np.int64),
            positions=table["position"].to_numpy().astype(np.int32),
            lengths=table["num_tokens"].to_numpy().astype(np.int64),
            supervised=table["num_supervised"].to_numpy().astype(np.int64),
        )
