"""What the rest of the store builds on: objects that appear whole or not at all."""

import errno
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage.directory import Directory
from storage.errors import ConfigError


def test_who_looks_during_a_publication_sees_the_old_or_the_new(tmp_path: Path) -> None:
    directory = Directory.at(str(tmp_path))
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
    directory = Directory.at(root)
    assert not directory.exists("key")
    directory.publish("key", b"first", replace=False)
    directory.publish("key", b"second", replace=False)
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
    directory = Directory.at(root)
    with directory.open("folder/pieces") as pieces:
        for piece in (b"a", b"", b"bc"):
            pieces.write(piece)
    assert directory.read("folder/pieces") == bytes(directory.read_large("folder/pieces")) == b"abc"
    assert directory.tags("folder") == {"pieces": pieces.tag}


def test_what_stands_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    directory = Directory.at(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot use"):
        directory.publish("commits/record", b"x")


def test_of_many_objects_only_those_that_failed_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of many thousand requests some always fail: all at once would never succeed."""
    directory = Directory.at("memory://many")
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
    monkeypatch.setattr("storage.retry.time.sleep", lambda _seconds: None)
    assert directory.read_many(keys) == {key: key.encode() for key in keys}
    assert sum(asked.values()) == sum(1 + number % 5 for number in range(300))
    with pytest.raises(FileNotFoundError):
        directory.read_many([*keys, "commits/9999.json"])


@pytest.mark.parametrize("url", ["/data/run::1", "memory://lake/llama[8b]", "s3://lake/what?"])
def test_names_that_mean_something_else_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="choose another name"):
        Directory.at(url)
