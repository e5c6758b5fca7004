"""Damage to every single object of a shard is found, named, never read, and repaired."""

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import CorruptError
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.synthetic import fill, tree_digests


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
    for path in object_paths(filled):
        damage(path)
        findings = filled.verify(deep=True)
        key = path.relative_to(filled.root.root).as_posix()
        assert [finding.object_key for finding in findings] == [key]
        with pytest.raises(CorruptError, match="eyas repair"):
            read_all(filled)
        if damage not in (flip, zero):
            assert [finding.object_key for finding in filled.verify(deep=False)] == [key]
        for finding in findings:
            assert finding.shard_id
            filled.revoke(finding.shard_id)
        fill(filled, samples)
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
    assert [finding.shard_id for finding in filled.verify(deep=False)] == [None]


def test_stale_temporaries_are_ignored_and_leftovers_swept(
    filled: Store, samples: list[StoredSample]
) -> None:
    whole = tree_digests(filled)
    root = Path(filled.root.root)
    record = next(iter(filled.commits().values()))
    stale = root / "commits" / f"{record.shard_id}.json.tmp"
    stale.write_bytes(b"half a rec")
    assert filled.verify(deep=True) == []
    filled.revoke(record.shard_id)
    (root / "shards" / record.shard_id / "left-behind").write_bytes(b"x")
    fill(filled, samples)
    assert tree_digests(filled) == whole
