"""Findings (what is wrong with a store, and where), and the checks that need only a listing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from storage.errors import REPAIR
from storage.objects.digests import ObjectDigest
from storage.objects.object_store import ObjectStore
from storage.records import keys
from storage.records.commit_record import CommitRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One difference from what was committed."""

    shard_id: str | None
    """The damaged shard, or None if the damage is not in one shard."""
    object_key: str
    """Key relative to the store's root."""
    problem: str
    """What was found and what was expected."""
    remedy: str

    def __str__(self) -> str:
        """Return one line for a report or an error."""
        return f"{self.object_key}: {self.problem}; {self.remedy}"


def shard_finding(shard_id: str, key: str, problem: str) -> Finding:
    """Return the finding that one object of a shard is damaged."""
    object_key = keys.shard_object(shard_id, key)
    return Finding(shard_id=shard_id, object_key=object_key, problem=problem, remedy=REPAIR)


def check_sizes(root: ObjectStore, record: CommitRecord) -> Iterator[Finding]:
    """Yield a finding for every object of the shard that is absent or has another size."""
    sizes = root.sizes(keys.shard_folder(record.shard_id))
    return _compare_sizes(record.shard_id, record.objects, sizes, prefix="")


def check_presence(
    root: ObjectStore, committed: Mapping[str, Mapping[str, ObjectDigest]]
) -> Iterator[Finding]:
    """Yield the findings of `check_sizes` for many shards, from a single listing."""
    sizes = root.sizes(keys.SHARDS)
    for shard_id, objects in committed.items():
        yield from _compare_sizes(shard_id, objects, sizes, prefix=f"{shard_id}/")


def _compare_sizes(
    shard_id: str, objects: Mapping[str, ObjectDigest], sizes: Mapping[str, int], *, prefix: str
) -> Iterator[Finding]:
    for key, expected in objects.items():
        found = sizes.get(prefix + key)
        if found is None:
            yield shard_finding(shard_id, key, f"is missing, committed {expected}")
        elif found != expected.num_bytes:
            yield shard_finding(shard_id, key, f"has {found} bytes, committed {expected}")
