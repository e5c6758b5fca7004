"""The commit record: the last thing written for a shard. No record, no shard.

It binds every object of the shard to its size and digest, the shard to its samples, and both to the
identity of the store, so that a swapped, old or foreign record is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from storage.errors import REPAIR, CorruptError, ShardCorruptError
from storage.objects.digests import ObjectDigest
from storage.objects.sealed_json import seal, unseal
from storage.records import keys
from storage.records.identity import FORMAT_VERSION, require_format
from storage.records.plan import shard_id as shard_id_of
from storage.records.probe_point import ProbePoint
from storage.records.sample_rows import is_id

MOST_BYTES = 5 << 40
"""Limit for one object; no server accepts more."""
SEVERAL_OBJECTS = 2
"""The format version in which a shard is several objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord:
    """What was committed as one shard."""

    shard_id: str
    identity_id: str
    sample_ids: tuple[str, ...]
    sample_tokens: tuple[int, ...]
    """Number of tokens per sample."""
    sample_supervised: tuple[int, ...]
    """Number of supervised tokens per sample."""
    raw_bytes: int
    """Size of the arrays before encoding."""
    objects: Mapping[str, ObjectDigest]
    """Object key, relative to the shard, to its committed size and digest."""
    probe: tuple[ProbePoint, ...]
    """The target's own predictions at some positions; empty if none were recorded."""
    format_version: int = FORMAT_VERSION
    """2: `objects` are those of the Zarr group; 3: they are in one ZIP file, named by attempt."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all samples."""
        return sum(self.sample_tokens)

    @property
    def num_supervised(self) -> int:
        """Return the supervised tokens of all samples."""
        return sum(self.sample_supervised)

    @property
    def stored_bytes(self) -> int:
        """Return the size of all objects."""
        return sum(digest.num_bytes for digest in self.objects.values())

    def to_json(self) -> bytes:
        """Serialise as the content of `commits/<shard_id>.json`."""
        document = {
            "format_version": self.format_version,
            "shard_id": self.shard_id,
            "identity_id": self.identity_id,
            "sample_ids": list(self.sample_ids),
            "sample_tokens": list(self.sample_tokens),
            "sample_supervised": list(self.sample_supervised),
            "num_tokens": self.num_tokens,
            "num_supervised": self.num_supervised,
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "objects": {key: [d.num_bytes, d.xxh3_128] for key, d in self.objects.items()},
            "probe": [point.to_document() for point in self.probe],
        }
        return seal(document)

    @classmethod
    def from_json(cls, data: bytes, *, shard_id: str, identity_id: str) -> Self:
        """Parse a record; raise ShardCorruptError unless it is of this shard in this store."""
        what = f"commit record of shard {shard_id}"
        try:
            document = unseal(data, what=what)
            require_format(document, what=what)
            record = cls._parse(document)
        except CorruptError as error:
            raise ShardCorruptError(f"{error}; {REPAIR}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ShardCorruptError(
                f"{what} has a missing or invalid field: {error!r}; {REPAIR}"
            ) from error
        derived = shard_id_of(record.sample_ids)
        if not record.shard_id == derived == shard_id:
            raise ShardCorruptError(
                f"{what} is the record of shard {record.shard_id} (its samples give {derived}); "
                f"{REPAIR}"
            )
        if record.identity_id != identity_id:
            raise ShardCorruptError(
                f"{what} belongs to a store with identity {record.identity_id}, this one is "
                f"{identity_id}; {REPAIR}"
            )
        return record

    @classmethod
    def _parse(cls, document: Mapping[str, Any]) -> Self:
        version = document["format_version"]
        return cls(
            shard_id=document["shard_id"],
            identity_id=document["identity_id"],
            sample_ids=tuple(document["sample_ids"]),
            sample_tokens=tuple(document["sample_tokens"]),
            sample_supervised=tuple(document["sample_supervised"]),
            raw_bytes=document["raw_bytes"],
            objects=parse_objects(document["objects"], format_version=version),
            probe=tuple(ProbePoint.of_document(point) for point in document["probe"]),
            format_version=version,
        )


def parse_objects(document: Any, *, format_version: int) -> Mapping[str, ObjectDigest]:  # noqa: ANN401 (JSON)
    """Return the objects of a shard from JSON.

    Raises:
        ValueError: an entry is invalid, or its key points outside of the shard.
        TypeError: there are none, or the document is not a mapping.

    """
    if not isinstance(document, dict) or not document:
        raise TypeError(f"objects are {document!r}")
    found: dict[str, ObjectDigest] = {}
    for key, value in document.items():
        num_bytes, digest = value
        parts = key.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\\" in key:
            raise ValueError(f"an object has the key {key!r}")
        if type(num_bytes) is not int or not 0 <= num_bytes <= MOST_BYTES or not is_id(digest):
            raise ValueError(f"object {key} has {num_bytes!r} bytes and digest {digest!r}")
        found[key] = ObjectDigest(num_bytes=num_bytes, xxh3_128=digest)
    is_file = [key.endswith(keys.SHARD_SUFFIX) and "/" not in key for key in found]
    if any(is_file) if format_version == SEVERAL_OBJECTS else is_file != [True]:
        raise ValueError(f"in version {format_version} it has the objects {sorted(found)[:3]}")
    return found
