"""The objects of a shard as one ZIP file: a single file to write, read and digest.

The ZIP format adds no compression, so an object is a slice of the file, and any Zarr implementation
reads it with a `ZipStore`. Equal objects in equal order give equal bytes.
"""

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from storage.encoding.zarr_arrays import OpenObject, Write

_LOCAL_HEADER_BYTES = 30
_LENGTHS_OFFSET = 26
"""Offset in a local header of the lengths of the two fields that follow it: name and extra."""
_UNIX = 3


@contextmanager
def packing(write: Write) -> Iterator[OpenObject]:
    """Yield a function that opens objects, one at a time; the file is complete after the block.

    An object is kept in memory until it is complete: the header before it holds its size.
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
        ValueError: this is not such a file.

    """
    view = memoryview(data)
    try:
        with zipfile.ZipFile(_Source(view)) as archive:
            return {entry.filename: _stored(view, entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise ValueError(f"it is not a complete ZIP file: {error}") from error


def _stored(view: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed (method {entry.compress_type})")
    lengths = struct.unpack_from("<HH", view, entry.header_offset + _LENGTHS_OFFSET)
    first = entry.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
    found = view[first : first + entry.file_size]
    if len(found) != entry.file_size:
        raise ValueError(f"{entry.filename} extends past the end of the file")
    return found


class _Sink:
    """The output of `zipfile`, which seeks back to the header of each object to complete it.

    The pieces are held, not copied: the first touch of fresh memory is expensive.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._pieces: list[bytes] = []
        self._starts_at = 0
        """Offset of the first piece: the header of an object."""
        self._ends_at = 0
        self._is_at_header = False

    def pass_on(self) -> None:
        """Write all held pieces: `zipfile` no longer seeks back to them."""
        pieces, self._pieces = self._pieces, []
        self._starts_at = self._ends_at
        for piece in pieces:
            self._write(piece)

    def write(self, data: bytes) -> int:
        if self._is_at_header:
            if len(data) != len(self._pieces[0]):
                raise ValueError("the header of an object cannot change its size")
            self._pieces[0] = data
        else:
            self._pieces.append(data)
            self._ends_at += len(data)
        return len(data)

    def seek(self, offset: int) -> int:
        if offset not in (self._starts_at, self._ends_at):
            raise ValueError(f"{offset} is neither the header of the object nor its end")
        self._is_at_header = bool(self._pieces) and offset == self._starts_at
        return offset

    def tell(self) -> int:
        return self._starts_at if self._is_at_header else self._ends_at

    def flush(self) -> None:
        """Do nothing: an object is passed on when it is complete."""

    def close(self) -> None:
        """Do nothing."""


class _Source(io.RawIOBase):
    """A file that reads from a buffer without copying it."""

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
