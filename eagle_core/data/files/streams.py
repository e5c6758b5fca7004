"""The bytes of a source file: decompressed, and text as UTF-8.

What a file is decides itself by its first bytes, not by its name.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, cast

import pyarrow as pa

from eagle_core.data.files.source_file import source_errors

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

HEAD_BYTES = 64 << 10
"""How much of a file is looked at to tell what it is."""
_BLOCK_BYTES = 1 << 20
DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, OSError)

_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    *((opening.encode("utf-16-le"), "utf-16-le") for opening in "[{"),
    *((opening.encode("utf-16-be"), "utf-16-be") for opening in "[{"),
)


class GuardedFile(io.RawIOBase):
    """An open file of any file system, whose errors are ours: see `source_errors`."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return whether the file system can seek; some web servers cannot."""
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, and return the new position in bytes."""
        with source_errors(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._file.tell()

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill the buffer, and return the number of bytes read."""
        view = memoryview(buffer).cast("B")
        with source_errors(self._path):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)


class ReplayedStream(io.RawIOBase):
    """A stream whose head was read already: gives the head, then what `read` gives.

    `read` returns some bytes each time, at most as many as asked for, and none at the end.
    """

    def __init__(self, head: bytes, read: Callable[[int], bytes]) -> None:
        self._head = head
        self._read = read

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill some of the buffer, and return the number of bytes read."""
        view = memoryview(buffer).cast("B")
        data = self._head or self._read(len(view))
        view[: len(data[: len(view)])] = data[: len(view)]
        self._head = data[len(view) :]
        return min(len(data), len(view))


def read_head(stream: io.RawIOBase) -> bytes:
    """Return the first `HEAD_BYTES` of a stream, or all of a shorter one."""
    head = b""
    while len(head) < HEAD_BYTES and (data := stream.read(HEAD_BYTES - len(head))):
        head += data
    return head


def decompressed(stream: io.RawIOBase, head: bytes) -> io.RawIOBase:
    """Return the decompressed bytes of a stream that begins with `head` and stands behind it."""
    whole = ReplayedStream(head, lambda size: stream.read(size) or b"")
    buffered = io.BufferedReader(whole, _BLOCK_BYTES)
    if head.startswith(b"\x1f\x8b"):
        return cast("io.RawIOBase", gzip.GzipFile(fileobj=buffered, mode="rb"))
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return cast("io.RawIOBase", bz2.BZ2File(buffered))
    if head.startswith(b"\xfd7zXZ\x00"):
        return cast("io.RawIOBase", lzma.LZMAFile(buffered))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        compressed = pa.PythonFile(buffered, mode="r")
        return cast("io.RawIOBase", pa.CompressedInputStream(compressed, "zstd"))
    return whole


def as_utf8(stream: io.RawIOBase, head: bytes) -> io.RawIOBase:
    """Return the text of a stream, which begins with `head` and stands behind it, as UTF-8.

    UTF-16 and UTF-32 are known by their byte order mark, UTF-16 also by a JSON bracket. Other text
    is passed on as it is. Positions in messages are those in UTF-8.
    """
    encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), None)
    if encoding is None:
        return ReplayedStream(head, lambda size: stream.read(size) or b"")
    decoder = codecs.getincrementaldecoder(encoding)()
    first = decoder.decode(head).encode("utf-8", "surrogatepass")
    return ReplayedStream(first, lambda _size: _next_utf8(stream, decoder))


def _next_utf8(stream: io.RawIOBase, decoder: codecs.IncrementalDecoder) -> bytes:
    """Return the next text; none only at the end. A cut character raises `UnicodeDecodeError`."""
    while data := stream.read(_BLOCK_BYTES):
        if text := decoder.decode(data):
            return text.encode("utf-8", "surrogatepass")
    return decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
