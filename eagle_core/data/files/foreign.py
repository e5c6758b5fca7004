"""Files that are no data of ours, known by their first bytes, each with what helps.

Such a file is never damage: no option accepts it.
"""

import re

from eagle_core.errors import CorruptError

_UNPACK = "unpack it and give the path of the files in it"
_CONVERT = "write its records as JSON lines or Parquet"
_DOWNLOAD = (
    "the address leads to a page for people (of the hub's, use `/resolve/` instead of `/blob/`, or "
    "`hf:ORG/NAME`), or to a login; use the address of the file itself"
)
_PICKLES = (b"\x02", b"\x03", b"\x04", b"\x05")
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a ZIP archive", _UNPACK),
    (b"PK\x05\x06", "an empty ZIP archive", "replace it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "LZ4 data", "decompress it, or compress it with gzip or zstd"),
    (b"\xff\x06\x00\x00sNaPpY", "Snappy data", "decompress it, or compress it with gzip or zstd"),
    (b"%PDF-", "a PDF document", "give the data that it describes"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "save the table as CSV"),
    (b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"FEA1\x00", "a Feather file of version 1", "write it again with pyarrow.feather (version 2)"),
    (b"\x89PNG\r\n", "a PNG image", "give the data that it shows"),
    (b"\xff\xd8\xff", "a JPEG image", "give the data that it shows"),
    *((b"\x80" + version, "a pickle, which may run any code", _CONVERT) for version in _PICKLES),
)  # fmt: skip
_PAGE = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = re.compile(rb"(/|(\.\./)*\.git/)annex/objects/\S+\s*")


def refuse_foreign(head: bytes, path: str) -> None:
    """Raise `CorruptError` with name and remedy if `head` begins no data file.

    `head` is decompressed; `path` is named in the message.
    """
    found = _named(head)
    if found is not None:
        what, remedy = found
        raise CorruptError(f"{path} is {what}, not data; {remedy}, then run again")


def _named(head: bytes) -> tuple[str, str] | None:
    """Return what a file is and what helps; None for what may be data."""
    return _binary(head) or _text(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def _binary(head: bytes) -> tuple[str, str] | None:
    if head.startswith(b"PK") and b"xl/" in head:
        return "an Excel workbook", "save its sheet as CSV"
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    return next(((what, remedy) for magic, what, remedy in _MAGIC if head.startswith(magic)), None)


def _text(text: bytes) -> tuple[str, str] | None:
    if text.startswith(_LFS):
        return f"a Git LFS pointer{_size_of_pointer(text)}", (
            "run `git lfs pull` in its repository, or download the file itself"
        )
    if _ANNEX.fullmatch(text):
        return "a git-annex pointer", "run `git annex get` in its repository"
    if _PAGE.match(text) or (text.startswith(b"<!--") and _PAGE.search(text)):
        return "an HTML page", _DOWNLOAD
    return _xml(text)


def _size_of_pointer(text: bytes) -> str:
    size = re.search(rb"^size (\d+)\s*$", text, re.MULTILINE)
    return f" (to a file of {int(size[1])} bytes)" if size else ""


def _xml(text: bytes) -> tuple[str, str] | None:
    """Return what XML is: an object store answers with it when it refuses."""
    if not re.match(rb"<(\?xml\b|[A-Za-z][\w:.-]*[\s/>])", text):
        return None
    refused = re.search(rb"<Error>.*?<Code>([^<]*)</Code>(?:.*?<Message>([^<]*))?", text, re.DOTALL)
    if refused:
        words = ": ".join(part.decode(errors="replace") for part in refused.groups() if part)
        return f"an error of an object store ({words})", "correct the address or the credentials"
    return "XML", _CONVERT
