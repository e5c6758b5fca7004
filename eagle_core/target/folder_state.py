"""The state of a target's folder: what was read from the files holds until one of them changes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderState:
    """Names, sizes and times of change of all files; equal as long as no file changed."""

    folder: Path
    files: tuple[tuple[str, int, int], ...]
    """Path below the folder, bytes and nanoseconds, in order."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return the present state; links are followed, as in the hub's cache."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        found = [(path, path.stat()) for path in paths]
        return cls(
            folder=folder,
            files=tuple(
                (str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns)
                for path, stat in found
            ),
        )
