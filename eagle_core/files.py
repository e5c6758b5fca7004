"""Files that are whole or absent: their digest, and making sure that they are on disk."""

import os
import tempfile
from pathlib import Path

import xxhash

FOLDER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a name must match that becomes a folder's: it stays in its parent, and is not hidden."""

_CHUNK_BYTES = 1 << 24


def file_digest(path: Path) -> str:
    """Return the xxh3_128 of a file's bytes, 32 hex digits; constant memory."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary sibling, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
