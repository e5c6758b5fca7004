"""Files and folders that are complete or absent, and disk errors that name them."""

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
"""Pattern for names that become folders: inside their parent and not hidden."""

PARTIAL = ".partial-"
"""Name prefix of folders that are being written."""
_CHUNK_BYTES = 1 << 24
_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""Errors that reading never causes."""


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
    """Write `text` to `path`, completely or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; its file is synced and moved to `path` when the block succeeds.

    Raises:
        DiskError: the file cannot be written; the previous one stays.

    """
    with _beside(path) as partial:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder; it is synced and moved to `path` when the block succeeds.

    Without `replace`, it is discarded if `path` exists by then.

    Raises:
        DiskError: the folder cannot be written; the previous one stays.

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
    """Yield a temporary path to move to `path`; anything left there is removed."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(path.parent) as folder:
            yield folder / path.name


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Yield a hidden folder in `parent`, removed with its contents when the block ends.

    Folders left by killed processes are removed first: a live process holds a lock on its folder.
    Folders of other hosts stay, because their locks may not be visible here.
    """
    host = socket.gethostname()
    for left in parent.glob(f"{PARTIAL}*"):
        owner = left.name.removeprefix(PARTIAL).rpartition("-")[0]
        if owner in {"", host}:  # earlier versions had no host in the name
            _remove_if_dead(left)
    folder, handle = _locked_folder(parent, f"{PARTIAL}{host}-")
    try:
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return a new folder and the descriptor that locks it; retry if it was removed meanwhile."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # some file systems have no locks; then nothing is removed
            fcntl.flock(handle, fcntl.LOCK_SH)  # waits only for a removal
        if folder.exists():
            return folder, handle
        os.close(handle)


def _remove_if_dead(folder: Path) -> None:
    with suppress(OSError):  # already gone, or locked by a live process
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert disk errors of a block that writes `path` into one error that names it.

    Errors from reading elsewhere pass through.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(error, path) and error.errno not in _WRITE_ERRNOS:
            raise
        raise DiskError(f"cannot write {path}: {error.strerror or error}{_hint(error)}") from error
    except SafetensorError as error:  # has the OS error only in its text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        found = OSError(int(number[1]), str(error))
        raise DiskError(f"cannot write {path}: {error}{_hint(found)}") from error


def _concerns(error: OSError, path: Path) -> bool:
    """Return whether an error concerns a path, a folder above it, or its temporary copy."""
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


def _hint(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "; free disk space or choose another folder (--home), then run the command again"
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return "; make it writable for the user of this process, or choose another folder (--home)"
    return "; fix that or choose another folder (--home), then run the command again"
