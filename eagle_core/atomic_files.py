"""Files and folders that are whole or absent, and errors of the disk that name them."""

import errno
import fcntl
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash
from safetensors import SafetensorError

from eagle_core.errors import DiskError

FOLDER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a name must match that becomes a folder's: it stays in its parent, and is not hidden."""

PARTIAL = ".partial-"
"""How the names of folders begin in which something is being written."""
_CHUNK_BYTES = 1 << 24
_ONLY_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""What nobody gets who reads."""


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
    """Write `text` to `path`, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield where to write a file that appears at `path`, on disk, when the block ends well.

    Raises:
        DiskError: it cannot be written; what was there before stays.

    """
    with _beside(path) as partial:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a new folder that appears at `path`, on disk, when the block ends well.

    Not to `replace` what is there, it is given up if another one came first.

    Raises:
        DiskError: it cannot be written; what was there before stays.

    """
    with _beside(path) as partial:
        partial.mkdir()
        yield partial
        for part in sorted(partial.rglob("*"), reverse=True):
            sync(part)
        sync(partial)
        if path.exists() and not replace:
            return
        if path.exists():
            path.rename(partial.with_name(f"{path.name}.before"))
        partial.rename(path)
        sync(path.parent)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield where to write what shall be moved to `path`; what is left there goes."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(path.parent) as folder:
            yield folder / path.name


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Yield a hidden folder in `parent`, removed with what is left in it when the block ends.

    What a kill left of others goes first: whoever is at work keeps a lock on the folder. Those of
    other hosts stay, whose locks may not be seen here.
    """
    host = socket.gethostname()
    for left in parent.glob(f"{PARTIAL}*"):
        owner = left.name.removeprefix(PARTIAL).rpartition("-")[0]
        if owner in {"", host}:  # versions before had no host in the name
            _remove_if_dead(left)
    folder, handle = _locked_folder(parent, f"{PARTIAL}{host}-")
    try:
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return a new folder and the descriptor that locks it; another if it was swept meanwhile."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # some file systems lock nothing, and then nothing is swept
            fcntl.flock(handle, fcntl.LOCK_SH)  # waits for a sweeper only
        if folder.exists():
            return folder, handle
        os.close(handle)


def _remove_if_dead(folder: Path) -> None:
    with suppress(OSError):  # it is gone, or somebody is at work in it
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk refuses in the block, which writes `path`, into one error that names it.

    What the block reads elsewhere has its own errors.
    """
    try:
        yield
    except OSError as error:
        if not _is_of(error, path) and error.errno not in _ONLY_WRITING:
            raise
        raise DiskError(f"cannot write {path}: {error.strerror or error}{_cure(error)}") from error
    except SafetensorError as error:  # says what the disk said, in words alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        found = OSError(int(number[1]), str(error))
        raise DiskError(f"cannot write {path}: {error}{_cure(found)}") from error


def _is_of(error: OSError, path: Path) -> bool:
    """Tell whether an error is of a path, a folder above it, or what is written in its stead."""
    if error.filename is None:
        return False
    named, own = Path(str(error.filename)).absolute(), path.absolute()
    around = (named, *named.parents)
    return (
        own in around
        or named in own.parents
        or any(p.parent == own.parent and p.name.startswith(PARTIAL) for p in around)
        or any(p.parent == own and p.name.startswith(PARTIAL) for p in around)
    )


def _cure(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "; free some space, or choose another folder (--home), and run the same again"
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return "; make it writable for the user of this process, or choose another folder (--home)"
    return "; mend that, or choose another folder (--home), and run the same again"
