"""What the rest of the store builds on: objects that appear whole or not at all."""

import errno
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage.errors import ConfigError
from storage.objects.object_store import ObjectStore


def test_who_looks_during_a_publication_sees_the_old_or_the_new(tmp_path: Path) -> None:
    directory = ObjectStore.at(str(tmp_path))
    versions = [bytes([number]) * (1 << 16) for number in range(40)]
    directory.publish("commits/record", versions[0])
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add((tmp_path / "commits" / "record").read_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for version in versions:
            directory.publish("commits/record", version)
    finally:
        done.set()
        looking.join()
    assert len(seen) > 1
    assert seen <= set(versions)
    assert [path.name for path in (tmp_path / "commits").iterdir()] == ["record"]


def test_an_object_that_is_there_stays_unless_it_is_to_be_replaced(root: str) -> None:
    directory = ObjectStore.at(root)
    assert not directory.exists("key")
    assert directory.create("key", b"first")
    assert not directory.create("key", b"second")
    assert directory.read("key") == b"first"
    directory.publish("key", b"third")
    assert directory.read("key") == b"third"
    assert directory.sizes("") == {"key": 5}
    directory.delete("key")
    directory.delete("key")
    assert not directory.exists("key")
    with pytest.raises(FileNotFoundError):
        directory.read("key")
    assert directory.sizes("") == {}


def test_an_object_written_in_pieces_is_the_same(root: str) -> None:
    directory = ObjectStore.at(root)
    with directory.open("folder/pieces") as write:
        for piece in (b"a", b"", b"bc"):
            write(piece)
    found = directory.read_large("folder/pieces", num_bytes=3)
    assert directory.read("folder/pieces") == bytes(found) == b"abc"


def test_a_large_object_is_read_in_parts(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.objects.object_store.RANGE_BYTES", 7)
    directory = ObjectStore.at(root)
    data = bytes(range(100))
    directory.write("large", data)
    for told in (100, 98, 96, 8):  # it may have grown since
        assert bytes(directory.read_large("large", num_bytes=told)) == data
    with pytest.raises(FileNotFoundError):
        directory.read_large("absent", num_bytes=100)


def test_a_listing_tells_when_something_was_written(root: str) -> None:
    directory = ObjectStore.at(root)
    directory.write("folder/key", b"abc")
    (entry,) = directory.entries("folder").values()
    assert entry.num_bytes == 3
    assert abs(entry.modified - time.time()) < 60


@pytest.mark.parametrize("links", [True, False])
def test_of_many_creators_one_creates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Nothing is locked; where there are no hard links, what stands is still one of them, whole."""
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", _no_links)
    directory = ObjectStore.at(str(tmp_path))
    for number in range(20):
        versions = [bytes([version]) * 4096 for version in range(8)]
        with ThreadPoolExecutor(8) as threads:
            key = f"commits/{number}"
            made = list(threads.map(lambda data, key=key: directory.create(key, data), versions))
        assert sum(made) == 1 or (sum(made) > 1 and not links)
        winners = [data for data, was_made in zip(versions, made, strict=True) if was_made]
        assert directory.read(key) in winners
    assert len(directory.sizes("commits")) == 20, "nothing temporary is left"


def _no_links(self: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted", str(self), None, str(target))


def test_what_stands_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    directory = ObjectStore.at(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot use"):
        directory.publish("commits/record", b"x")


def test_of_many_objects_only_those_that_failed_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of many thousand requests some always fail: all at once would never succeed."""
    directory = ObjectStore.at("memory://many")
    keys = [f"commits/{number}.json" for number in range(300)]
    for key in keys:
        directory.write(key, key.encode())
    asked: Counter[str] = Counter()
    cat_file = MemoryFileSystem.cat_file

    def failing_often(self: MemoryFileSystem, path: str, *args: Any, **more: Any) -> bytes:
        asked[path] += 1
        number = int(path.rpartition("/")[2].removesuffix(".json"))
        if asked[path] <= number % 5:
            raise OSError(errno.EBUSY, "slow down")
        return cat_file(self, path, *args, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing_often)
    monkeypatch.setattr("storage.objects.retry.time.sleep", lambda _seconds: None)
    assert directory.read_many(keys) == {key: key.encode() for key in keys}
    assert sum(asked.values()) == sum(1 + number % 5 for number in range(300))
    with pytest.raises(FileNotFoundError):
        directory.read_many([*keys, "commits/9999.json"])


@pytest.mark.parametrize("url", ["/data/run::1", "memory://lake/llama[8b]", "s3://lake/what?"])
def test_names_that_mean_something_else_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="choose another name"):
        ObjectStore.at(url)
