"""Damage to the data or the record of a shard is found, named, never read, and repaired."""

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import CorruptError
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.synthetic import drop_leftovers, fill, tree_digests


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: list[Callable[[Path], None]] = [flip, truncate, empty, zero, Path.unlink]


def object_paths(store: Store) -> list[Path]:
    record = next(iter(store.commits().values()))
    root = Path(store.root.root)
    return [root / "shards" / record.shard_id / key for key in record.objects] + [
        root / "commits" / f"{record.shard_id}.json"
    ]


def read_all(store: Store) -> None:
    reader = store.reader(store.snapshot())
    for index in range(len(reader)):
        reader.fetch(index)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_read_and_repaired(
    filled: Store, samples: list[StoredSample], damage: Callable[[Path], None]
) -> None:
    healthy = tree_digests(filled)
    read_all(filled)
    for number in range(len(object_paths(filled))):
        path = object_paths(filled)[number]
        damage(path)
        findings = verify_store(filled, deep=True)
        key = path.relative_to(filled.root.root).as_posix()
        assert [finding.object_key for finding in findings] == [key]
        with pytest.raises(CorruptError, match="eyas repair"):
            read_all(filled)
        if damage not in (flip, zero):
            assert [finding.object_key for finding in verify_store(filled, deep=False)] == [key]
        for finding in findings:
            assert finding.shard_id
            filled.revoke(finding.shard_id)
        fill(filled, samples)
        drop_leftovers(filled)
        assert tree_digests(filled) == healthy


def test_damaged_snapshot_is_found(filled: Store) -> None:
    snapshot_id = filled.snapshot().snapshot_id
    path = Path(filled.root.root) / "snapshots" / f"{snapshot_id}.parquet"
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 50)):
        path.write_bytes(whole[:position])
        with pytest.raises(CorruptError, match=snapshot_id):
            filled.snapshot()
    path.write_bytes(b"")
    assert [finding.shard_id for finding in verify_store(filled, deep=False)] == [None]


def test_what_kills_leave_behind_is_ignored_until_it_is_collected(
    filled: Store, samples: list[StoredSample]
) -> None:
    whole = tree_digests(filled)
    root = Path(filled.root.root)
    record = next(iter(filled.commits().values()))
    (root / "commits" / f"{record.shard_id}.json.0a1b2c3d.tmp").write_bytes(b"half a rec")
    (root / "shards" / record.shard_id / "0123456789abcdef.zarr.zip").write_bytes(b"half")
    assert verify_store(filled, deep=True) == []
    filled.revoke(record.shard_id)
    fill(filled, samples)
    assert verify_store(filled, deep=True) == []
    keep = snapshots_to_keep(filled)
    young = find_garbage(filled, keep=keep)
    assert not young
    stored_bytes = record.stored_bytes
    assert young.young_bytes == len(b"half a rec") + len(b"half") + stored_bytes
    old = find_garbage(filled, keep=keep, older_than_hours=0)
    assert (old.shard_ids, old.num_bytes, old.young_bytes) == ((), young.young_bytes, 0)
    assert (len(old.leftovers), len(old.revocations)) == (3, 1)
    collect(filled, old)
    assert tree_digests(filled) == whole
