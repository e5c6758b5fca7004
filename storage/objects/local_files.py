"""Local files that are durable when a call returns: bytes and names are fsynced."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes | memoryview], object]]:
    """Yield a function that appends to a new file; after the block its bytes are durable, its name
    is not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        yield file.write
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file; its bytes are durable, its name is not."""
    with new_file(path) as append:
        append(data)


@contextmanager
def temporary_file(path: Path, data: bytes) -> Iterator[Path]:
    """Yield a file with `data` beside `path`, to be renamed or linked; removed after the block."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        write_file(temporary, data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)  # frees its space if the disk is full


def sync_names(folder: Path, *, root: Path) -> None:
    """Make the names in `folder` durable, and those of the folders from `root` down to it."""
    for parent in (folder, *folder.parents):
        if parent in (folder, root.parent) or parent.is_relative_to(root):
            sync_folder(parent)


def sync_tree(folder: Path) -> None:
    """Make the names in a folder, and in all below it, durable."""
    for below, _, _ in os.walk(folder, topdown=False, onerror=_raise):
        sync_folder(Path(below))


def sync_folder(path: Path) -> None:
    """Make the names in one folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise(error: OSError) -> None:
    raise error
