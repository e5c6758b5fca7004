"""All objects below a prefix, in one listing: a folder that fails is an error, not empty.

fsspec's own `find` skips every folder that fails: a store on a faulty disk would appear to have no
shards, and all of its data would appear to be garbage.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The listing entry of one object."""

    num_bytes: int
    modified: float
    """When it was written, in seconds since 1970 by the clock of the disk or server; infinite if
    unknown."""


def list_objects(file_system: fsspec.AbstractFileSystem, base: str) -> Mapping[str, Entry]:
    """Return the objects below `base` by path.

    A missing folder or a file has nothing below it. Objects that vanish meanwhile are skipped, and
    so are broken links.

    Raises:
        OSError: any other failure.

    """
    if isinstance(file_system, LocalFileSystem):
        return dict(_on_disk(base))
    if "s3" in file_system.protocol:  # one listing for the whole tree, a thousand objects per page
        # By prefix: for an empty folder, `find` checks by HEAD whether it is an object.
        parent, separator, name = base.rpartition("/")
        found = (
            file_system.find(parent, prefix=f"{name}/", detail=True)
            if separator
            else file_system.find(base, detail=True)
        )
        return {path: _entry(info) for path, info in found.items()}
    return dict(_by_folder(file_system, base))


def _on_disk(folder: str) -> Iterator[tuple[str, Entry]]:
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _on_disk(entry.path)
            continue
        try:
            status = entry.stat()
        except OSError as error:
            if isinstance(error, FileNotFoundError) or entry.is_symlink():
                continue
            raise
        yield entry.path, Entry(num_bytes=status.st_size, modified=status.st_mtime)


def _by_folder(file_system: fsspec.AbstractFileSystem, folder: str) -> Iterator[tuple[str, Entry]]:
    try:
        entries = file_system.ls(folder, detail=True)
    except FileNotFoundError:
        return
    for entry in entries:
        path = entry["name"].rstrip("/")
        if entry["type"] != "directory":
            yield path, _entry(entry)
        elif path != folder.rstrip("/"):  # a server may list the folder itself
            yield from _by_folder(file_system, path)


def _entry(info: Mapping[str, Any]) -> Entry:
    names = ("LastModified", "last_modified", "updated", "mtime", "created")
    written = next((info[name] for name in names if info.get(name) is not None), None)
    seconds = written.timestamp() if isinstance(written, datetime) else None
    if isinstance(written, int | float):
        seconds = float(written)
    # Without a write time, an object must not count as old.
    return Entry(num_bytes=info["size"], modified=float("inf") if seconds is None else seconds)
