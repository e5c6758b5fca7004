"""What the rest of the store builds on: objects that appear whole or not at all."""

import threading
from pathlib import Path

import pytest

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
