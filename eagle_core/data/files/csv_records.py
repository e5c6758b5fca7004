"""Records of a CSV file with a header line, streamed."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from eagle_core.data.source_record import SourceRecord
from eagle_core.errors import CorruptError

_MAX_HEADER_BYTES = 1 << 16
_MAX_FIELD_CHARACTERS = 1 << 28


def read_csv(
    stream: "io.BufferedReader[io.RawIOBase]",
    *,
    path: str,
    fraction: Callable[[], float],
    delimiter: str = ",",
) -> Iterator[SourceRecord]:
    """Yield one mapping per row, from column to text; the header tells what separates cells.

    Raises `CorruptError` for bytes that are not UTF-8 and for a row with more or fewer cells than
    the header, as in a file that is truncated or has a stray quote, and for two columns of one
    name. Several columns without a name are called by their places, such as `column 3`.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    row = 0
    delimiter = _delimiter(stream.peek(_MAX_HEADER_BYTES))
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True, delimiter=delimiter)
            header = _names(next(reader, []), path)
            for row, cells in enumerate(reader):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise CorruptError(
                        f"{path}, row {row} (line {reader.line_num}) has {len(cells)} cells, but "
                        f"the header has {len(header)}; replace the file and run again"
                    )
                yield SourceRecord(
                    value=dict(zip(header, cells, strict=True)),
                    location=f"{PurePosixPath(path).name}, row {row}",
                    fraction_read=fraction(),
                )
    except (csv.Error, UnicodeDecodeError) as error:
        raise CorruptError(
            f"{path} is not valid UTF-8 CSV after row {row}: {error}; save it as UTF-8 or "
            "replace it, then run again"
        ) from error


def _names(header: list[str], path: str) -> list[str]:
    """Return the names of the columns, each once."""
    counts = Counter(header)
    twice = next((name for name, count in counts.items() if name.strip() and count > 1), None)
    if twice is not None:
        raise CorruptError(
            f"{path} has two columns named {twice!a}; rename or remove one, then run again"
        )
    return [f"column {place}" if counts[name] > 1 else name for place, name in enumerate(header, 1)]


def _delimiter(head: bytes) -> str:
    """Return what separates the cells of the header: spreadsheets write `;` in some languages."""
    header = head.splitlines()[0] if head else b""
    return next((sign for sign in (",", ";", "\t") if sign.encode() in header), ",")
