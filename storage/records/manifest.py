"""Many commit records in two files, so that a store of a million shards opens with a few reads.

A manifest has one row per shard: `<id>.shards.parquet` holds what opening a store needs, and
`<id>.samples.parquet` holds its samples, which only plans and snapshots need. Neither ever changes.
The id is the digest of the first file, which holds the digest of the second and a random token: no
id occurs twice. Since many shards depend on them, each file has a copy.
"""

import io
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.errors import CorruptError, MovedError
from storage.objects.digests import ObjectDigest
from storage.objects.object_store import ObjectStore
from storage.objects.sealed_json import canonical_json, digest_bytes
from storage.records import keys
from storage.records.commit_record import CommitRecord, parse_objects
from storage.records.identity import FORMAT_VERSION
from storage.records.probe_point import ProbePoint
from storage.records.sample_rows import ID_BYTES, SampleRows, ids_of, is_id

SHARDS, SAMPLES = "shards", "samples"
KINDS = (SHARDS, SAMPLES)
MISSING = "is missing"
_METADATA = b"eyas"
_SHARD_COLUMNS = (
    "shard_id",
    "record_id",
    "format_version",
    "raw_bytes",
    "stored_bytes",
    "num_samples",
    "num_tokens",
    "num_supervised",
    "num_probed",
)
"""Columns with one number, or 16 bytes, per shard; the objects have a column besides these."""
_PARSING = (pa.ArrowException, OSError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Manifest:
    """S committed shards."""

    manifest_id: str
    root: ObjectStore
    identity_id: str
    samples_digest: str
    shard_ids: NDArray[np.bytes_]
    """[S] 16 bytes each, ascending"""
    record_ids: NDArray[np.bytes_]
    """[S] 16 bytes each: the digest of the whole record"""
    format_versions: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]
    stored_bytes: NDArray[np.int64]
    num_samples: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_supervised: NDArray[np.int64]
    num_probed: NDArray[np.int64]
    """[S] points of the semantic probe"""
    objects: pa.Array
    """[S] JSON of `CommitRecord.objects`"""

    @classmethod
    def write(cls, root: ObjectStore, records: Sequence[CommitRecord], *, identity_id: str) -> Self:
        """Write a manifest of these shards, read it back and return it."""
        ordered = sorted(records, key=lambda record: record.shard_id)
        samples = _samples_file(ordered)
        shards = _shards_file(ordered, identity_id=identity_id, samples=digest_bytes(samples))
        manifest_id = digest_bytes(shards)
        for kind, data in ((SAMPLES, samples), (SHARDS, shards)):  # the shards file makes it exist
            for key in keys.manifest_copies(manifest_id, kind):
                root.publish(key, data)
        manifest = cls.read(root, manifest_id, identity_id=identity_id)
        manifest.require_whole()
        return manifest

    @classmethod
    def read(cls, root: ObjectStore, manifest_id: str, *, identity_id: str) -> Self:
        """Read what opening a store needs.

        Raises:
            CorruptError: both copies are damaged, or belong to another store.
            MovedError: there is no manifest with this id any more.

        """
        data = _whole(root, manifest_id, SHARDS, digest=manifest_id)
        what = f"manifest {manifest_id}"
        try:
            table = _read(data, [*_SHARD_COLUMNS, "objects"])
            metadata = json.loads(table.schema.metadata[_METADATA])
            columns = {name: table[name].combine_chunks() for name in _SHARD_COLUMNS}
            found = cls(
                manifest_id=manifest_id,
                root=root,
                identity_id=metadata["identity_id"],
                samples_digest=metadata["samples"],
                shard_ids=_ids(columns["shard_id"]),
                record_ids=_ids(columns["record_id"]),
                objects=table["objects"].combine_chunks(),
                **{
                    field: columns[name].to_numpy()
                    for name, field in (
                        ("format_version", "format_versions"),
                        *((name, name) for name in _SHARD_COLUMNS[3:]),
                    )
                },
            )
        except _PARSING as error:
            raise CorruptError(f"{what} does not parse: {error}; {_REMEDY}") from error
        if found.identity_id != identity_id:
            raise CorruptError(
                f"{what} belongs to a store with identity {found.identity_id}, this one is "
                f"{identity_id}; {_REMEDY}"
            )
        return found

    def require_whole(self) -> None:
        """Raise CorruptError unless every copy of both files matches its digest."""
        for key, problem in self.damage():
            raise CorruptError(f"{self.root.where(key)} {problem} right after it was written")

    def damage(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the problem of each copy that is damaged or missing."""
        digests = {SHARDS: self.manifest_id, SAMPLES: self.samples_digest}
        for kind, digest in digests.items():
            for key in keys.manifest_copies(self.manifest_id, kind):
                try:
                    found = digest_bytes(self.root.read(key))
                except FileNotFoundError:
                    yield key, MISSING
                    continue
                if found != digest:
                    yield key, f"has digest {found}, expected {digest}"

    def mend(self) -> None:
        """Restore each copy that is damaged or missing from the other one."""
        digests = {SHARDS: self.manifest_id, SAMPLES: self.samples_digest}
        for key, _ in list(self.damage()):
            kind = key.split(".")[-2]
            data = _whole(self.root, self.manifest_id, kind, digest=digests[kind])
            self.root.publish(key, data)

    def row(self, shard_id: str) -> int | None:
        """Return the row of a shard, None if it is not in this manifest."""
        if not is_id(shard_id):
            return None
        wanted = np.frombuffer(bytes.fromhex(shard_id), self.shard_ids.dtype)
        row = int(np.searchsorted(self.shard_ids, wanted)[0])
        return row if row < len(self.shard_ids) and self.shard_ids[row] == wanted[0] else None

    def has(
        self, shard_ids: NDArray[np.bytes_], record_ids: NDArray[np.bytes_]
    ) -> NDArray[np.bool_]:
        """Return [N] whether this manifest has exactly the given record of each shard."""
        at = np.minimum(np.searchsorted(self.shard_ids, shard_ids), len(self.shard_ids) - 1)
        found: NDArray[np.bool_] = (self.shard_ids[at] == shard_ids) & (
            self.record_ids[at] == record_ids
        )
        return found

    def record_id_at(self, row: int) -> str:
        """Return the digest of the record of a shard."""
        return self.record_ids[row : row + 1].tobytes().hex()

    def record_id_of(self, shard_id: str) -> str | None:
        """Return the digest of the record of a shard, None if it is not in this manifest."""
        row = self.row(shard_id)
        return None if row is None else self.record_id_at(row)

    def objects_at(self, row: int) -> Mapping[str, ObjectDigest]:
        """Return the committed digests of a shard's objects."""
        return parse_objects(
            json.loads(self.objects[row].as_py()), format_version=int(self.format_versions[row])
        )

    def samples(self, *, with_probes: bool = True) -> pa.Table:
        """Return the samples, and the probes, of all shards: [S] rows.

        Raises:
            CorruptError: both copies are damaged.
            MovedError: the manifest does not exist any more.

        """
        data = _whole(self.root, self.manifest_id, SAMPLES, digest=self.samples_digest)
        return _read(data, ["sample_ids", "tokens", "supervised", *["probe"] * with_probes])

    def sample_rows(self, keep: NDArray[np.bool_]) -> SampleRows:
        """Return the samples of the shards in [S] `keep`, one row per sample."""
        table = self.samples(with_probes=False)
        if not keep.all():
            table = table.filter(pa.array(keep))
        return SampleRows(
            shard_ids=self.shard_ids[keep],
            shards=np.repeat(np.arange(int(keep.sum())), self.num_samples[keep]),
            sample_ids=_joined(table["sample_ids"]).view(f"S{ID_BYTES}"),
            tokens=_joined(table["tokens"]).view(np.int32),
            supervised=_joined(table["supervised"]).view(np.int32),
        )

    def record(self, row: int, samples: pa.Table) -> CommitRecord:
        """Return the whole record of one shard, given what `samples` returns."""
        ids, tokens, supervised, probe = (
            samples[name][row].as_py() for name in ("sample_ids", "tokens", "supervised", "probe")
        )
        names = ids.hex()
        return CommitRecord(
            shard_id=self.shard_ids[row : row + 1].tobytes().hex(),
            identity_id=self.identity_id,
            sample_ids=tuple(
                names[at : at + 2 * ID_BYTES] for at in range(0, len(names), 2 * ID_BYTES)
            ),
            sample_tokens=tuple(np.frombuffer(tokens, np.int32).tolist()),
            sample_supervised=tuple(np.frombuffer(supervised, np.int32).tolist()),
            raw_bytes=int(self.raw_bytes[row]),
            objects=self.objects_at(row),
            probe=tuple(ProbePoint.of_document(point) for point in json.loads(probe)),
            format_version=int(self.format_versions[row]),
        )


_REMEDY = "delete its files below manifests, then run hidden-states to regenerate what they held"


def manifest_ids(root: ObjectStore) -> Sequence[str]:
    """Return the ids of all manifests with at least one copy, sorted."""
    ending = f".{SHARDS}.parquet"
    names = (key.rpartition("/")[2] for key in root.sizes(keys.MANIFESTS))
    return sorted({name.removesuffix(ending) for name in names if name.endswith(ending)})


def delete_manifest(root: ObjectStore, manifest_id: str) -> None:
    """Remove a manifest whose shards are in other manifests."""
    for kind in KINDS:
        for key in reversed(keys.manifest_copies(manifest_id, kind)):
            root.delete(key)


def record_id(record: CommitRecord) -> str:
    """Return the digest that distinguishes a record from others of the same shard."""
    return digest_bytes(record.to_json())


def _whole(root: ObjectStore, manifest_id: str, kind: str, *, digest: str) -> bytes:
    """Return a file from the first intact copy."""
    absent = 0
    copies = keys.manifest_copies(manifest_id, kind)
    for key in copies:
        try:
            data = root.read(key)
        except FileNotFoundError:
            absent += 1
            continue
        if digest_bytes(data) == digest:
            return data
    if absent == len(copies) and not (
        kind == SAMPLES and any(map(root.exists, keys.manifest_copies(manifest_id, SHARDS)))
    ):
        raise MovedError(
            f"{root.where(copies[0])} is gone: it was merged into another manifest after it was "
            "listed. Run the same command again"
        )
    raise CorruptError(
        f"manifest {manifest_id} ({kind}) is damaged or lost, and so is its copy; {_REMEDY}"
    )


def _shards_file(records: Sequence[CommitRecord], *, identity_id: str, samples: str) -> bytes:
    numbers: dict[str, list[int]] = {
        "format_version": [record.format_version for record in records],
        "raw_bytes": [record.raw_bytes for record in records],
        "stored_bytes": [record.stored_bytes for record in records],
        "num_samples": [len(record.sample_ids) for record in records],
        "num_tokens": [record.num_tokens for record in records],
        "num_supervised": [record.num_supervised for record in records],
        "num_probed": [len(record.probe) for record in records],
    }
    table = pa.table(
        {
            "shard_id": _id_array([record.shard_id for record in records]),
            "record_id": _id_array([record_id(record) for record in records]),
            **{name: pa.array(values, pa.int64()) for name, values in numbers.items()},
            "objects": pa.array(
                [canonical_json(_objects_document(record)) for record in records],
                pa.large_binary(),
            ),
        }
    )
    metadata = {
        "format_version": FORMAT_VERSION,
        "identity_id": identity_id,
        "samples": samples,
        "attempt": secrets.token_hex(8),  # so that no key is ever reused: see ADR 10
    }
    return _written(table.replace_schema_metadata({_METADATA: canonical_json(metadata)}))


def _samples_file(records: Sequence[CommitRecord]) -> bytes:
    def packed(rows: Iterator[Sequence[int]]) -> pa.Array:
        return pa.array([np.array(row, np.int32).tobytes() for row in rows], pa.large_binary())

    return _written(
        pa.table(
            {
                "sample_ids": pa.array(
                    [bytes.fromhex("".join(record.sample_ids)) for record in records],
                    pa.large_binary(),
                ),
                "tokens": packed(record.sample_tokens for record in records),
                "supervised": packed(record.sample_supervised for record in records),
                "probe": pa.array(
                    [
                        canonical_json([point.to_document() for point in record.probe])
                        for record in records
                    ],
                    pa.large_binary(),
                ),
            }
        )
    )


def _written(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()


def _read(data: bytes, columns: Sequence[str]) -> pa.Table:
    # No Arrow threads: one that still runs when Python exits aborts the process.
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=list(columns), use_threads=False)


def _objects_document(record: CommitRecord) -> Mapping[str, object]:
    return {key: [d.num_bytes, d.xxh3_128] for key, d in record.objects.items()}


def _id_array(names: Sequence[str]) -> pa.Array:
    data = pa.py_buffer(ids_of(names).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ID_BYTES), len(names), [None, data])


def _ids(column: pa.Array) -> NDArray[np.bytes_]:
    first = column.offset * ID_BYTES
    data = column.buffers()[1]
    return np.frombuffer(data, np.uint8)[first : first + len(column) * ID_BYTES].view(
        f"S{ID_BYTES}"
    )


def _joined(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Return the bytes of all rows, concatenated."""
    parts: list[NDArray[np.uint8]] = []
    for chunk in column.chunks:
        _, offsets, values = chunk.buffers()
        if values is not None and len(chunk):
            ends = np.frombuffer(offsets, np.int64)
            first, stop = int(ends[chunk.offset]), int(ends[chunk.offset + len(chunk)])
            parts.append(np.frombuffer(values, np.uint8)[first:stop])
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)
