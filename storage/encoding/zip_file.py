"""The objects of a shard as one ZIP file: one thing to write, to read, to digest and to lose.

Nothing in it is compressed again, so an object is a slice of the file, and any Zarr reads it with a
`ZipStore`. Equal objects in equal order give equal bytes.
"""

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from storage.encoding.zarr_arrays import OpenObject, Write

_LOCAL_HEADER_BYTES = 30
_LENGTHS_OFFSET = 26
"""Where a local header has the lengths of the two fields that follow it: name and extra."""
_UNIX = 3


@contextmanager
def packing(write: Write) -> Iterator[OpenObject]:
    """Hand out what opens the objects, one after the other; the file is whole after the block.

    An object is in memory until it is whole: its size stands before it.
    """
    sink = _Sink(write)
    with zipfile.ZipFile(sink, "w") as archive:

        @contextmanager
        def open_object(key: str) -> Iterator[Write]:
            entry = zipfile.ZipInfo(key)  # its date is always the same
            entry.create_system = _UNIX
            with archive.open(entry, "w", force_zip64=True) as stream:
                yield stream.write
            sink.pass_on()

        yield open_object
    sink.pass_on()


def unpacked(data: bytes | memoryview) -> Mapping[str, memoryview]:
    """Return the objects by key, as views of `data`.

    Raises:
        ValueError: this is no such file.

    """
    view = memoryview(data)
    try:
        with zipfile.ZipFile(_Source(view)) as archive:
            return {entry.filename: _stored(view, entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise ValueError(f"it is no whole ZIP file: {error}") from error


def _stored(view: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed (method {entry.compress_type})")
    lengths = struct.unpack_from("<HH", view, entry.header_offset + _LENGTHS_OFFSET)
    first = entry.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
    found = view[first : first + entry.file_size]
    if len(found) != entry.file_size:
        raise ValueError(f"{entry.filename} ends behind the file")
    return found


class _Sink:
    """Takes what `zipfile` writes, which goes back to the head of each object when it is whole.

    What it was given is held, not copied: memory that is touched for the first time is dear.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._pieces: list[bytes] = []
        self._starts_at = 0
        """Where the first piece lies: the head of an object."""
        self._ends_at = 0
        self._is_at_head = False

    def pass_on(self) -> None:
        """Write all that is held: nothing goes back to it any more."""
        pieces, self._pieces = self._pieces, []
        self._starts_at = self._ends_at
        for piece in pieces:
            self._write(piece)

    def write(self, data: bytes) -> int:
        if self._is_at_head:
            if len(data) != len(self._pieces[0]):
                raise ValueError("the head of an object cannot change its size")
            self._pieces[0] = data
        else:
            self._pieces.append(data)
            self._ends_at += len(data)
        return len(data)

    def seek(self, offset: int) -> int:
        if offset not in (self._starts_at, self._ends_at):
            raise ValueError(f"{offset} is neither the head of the object nor its end")
        self._is_at_head = bool(self._pieces) and offset == self._starts_at
        return offset

    def tell(self) -> int:
        return self._starts_at if self._is_at_head else self._ends_at

    def flush(self) -> None:
        """Do nothing: what is held is passed on when it is whole."""

    def close(self) -> None:
        """Do nothing."""


class _Source(io.RawIOBase):
    """A file over a buffer, without a copy of it."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        if origin + offset < 0:
            raise OSError(f"{offset} bytes from {origin} is before the first byte")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        found = self._view[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
