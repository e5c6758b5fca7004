"""The layout of a store: each object's key, relative to the root.

`docs/store-format.md` shows the tree. No other module builds a key.
"""

from collections.abc import Sequence

IDENTITY = "store.json"
SHARDS = "shards"
RECORDS = "commits"
REVOCATIONS = "revoked"
MANIFESTS = "manifests"
PLANS = "plans"
SNAPSHOTS = "snapshots"
LATEST = f"{SNAPSHOTS}/latest.json"
REFS = f"{SNAPSHOTS}/refs"
EXCLUSIONS = "excluded"

JSON_SUFFIX = ".json"
PARQUET_SUFFIX = ".parquet"
SHARD_SUFFIX = ".zarr.zip"
"""Suffix of a shard that is one file."""


def shard_folder(shard_id: str) -> str:
    """Return the prefix of the objects of a shard."""
    return f"{SHARDS}/{shard_id}"


def shard_object(shard_id: str, name: str) -> str:
    """Return the key of one object of a shard."""
    return f"{SHARDS}/{shard_id}/{name}"


def record(shard_id: str) -> str:
    """Return the key of the single commit record of a shard."""
    return f"{RECORDS}/{shard_id}{JSON_SUFFIX}"


def revocation(shard_id: str, record_id: str) -> str:
    """Return the key of the note that revokes a row of a manifest."""
    return f"{REVOCATIONS}/{shard_id}/{record_id}{JSON_SUFFIX}"


def manifest_copies(manifest_id: str, kind: str) -> Sequence[str]:
    """Return the keys of both copies of one file of a manifest."""
    name = f"{manifest_id}.{kind}{PARQUET_SUFFIX}"
    return [f"{MANIFESTS}/{name}", f"{MANIFESTS}/copies/{name}"]


def plan(plan_id: str) -> str:
    """Return the key of a plan."""
    return f"{PLANS}/{plan_id}{JSON_SUFFIX}"


def snapshot(snapshot_id: str) -> str:
    """Return the key of a snapshot."""
    return f"{SNAPSHOTS}/{snapshot_id}{PARQUET_SUFFIX}"


def ref(name: str) -> str:
    """Return the key of a snapshot's name."""
    return f"{REFS}/{name}{JSON_SUFFIX}"


def exclusion(sample_id: str) -> str:
    """Return the key of the note that excludes a sample."""
    return f"{EXCLUSIONS}/{sample_id}{JSON_SUFFIX}"


def folder(key: str) -> str:
    """Return the folder of a key, directly below the root; the key itself if it has none."""
    return key.partition("/")[0]


def without(name: str, suffix: str) -> str | None:
    """Return a name without its suffix, None if it has another one."""
    return name.removesuffix(suffix) if name.endswith(suffix) else None
