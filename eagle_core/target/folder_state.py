"""The state of a target's folder: what was read from the files holds until one of them changes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Self

FileIdentity = tuple[int, ...]
"""Device, inode, bytes, and nanoseconds of the change of the content and of anything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderState:
    """The files of a folder as they are at one time; equal as long as none changed."""

    folder: Path
    resolved: Path
    """Where the folder is, if it is a link."""
    files: tuple[tuple[str, FileIdentity], ...]
    """Path below the folder and which file or folder it is, in order."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return the present state; links are followed, as in the hub's cache."""
        resolved = folder.resolve()
        found = ((path, file_identity(path)) for path in _paths(resolved))
        files = [(str(path.relative_to(resolved)), one) for path, one in found if one is not None]
        return cls(folder=folder, resolved=resolved, files=tuple(sorted(files)))


def _paths(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder and all folders below it that are no links."""
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in [*folders, *files])


def file_identity(path: Path) -> FileIdentity | None:
    """Return which file it is; None if it cannot be read, or vanished, as temporary files do.

    Of a folder, which may be a link, only what it is: its files have states of their own.
    """
    try:
        stat = path.stat()
    except OSError:
        return None
    which = (stat.st_dev, stat.st_ino)
    if S_ISDIR(stat.st_mode):
        return which
    return *which, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
