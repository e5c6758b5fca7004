"""Records of a JSON array or of JSON lines, streamed in constant memory, each with its byte offset.

The incremental parser knows where every record starts, so it can report a truncated file ("17671
whole records, the next one starts at byte N") and attribute damage. Bytes that are not UTF-8 are
decoded to lone surrogates, so that a broken record does not hide the next one.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NoReturn

from eagle_core.data.ledger import Reason
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.errors import CorruptError

_CHUNK_BYTES = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_LONGEST_LITERAL = 16
"""A syntax error this close to the end of the text may be a truncated literal or escape."""
Fraction = Callable[[], float]
"""Returns the fraction of the source that has been read, 0 to 1."""


class JsonArrayReader:
    """Reads the records of one JSON array, one after the other."""

    def __init__(
        self, file: BinaryIO, *, path: str, fraction: Fraction, max_record_bytes: int
    ) -> None:
        self._file = file
        self._path = path
        self._fraction = fraction
        self._max_record_bytes = max_record_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._position = 0  # in characters of self._text
        self._offset = 0  # the same position in bytes of the file
        self._at_end = False
        self.num_records = 0

    def read(
        self, *, accept_truncated: bool, accept_damaged: bool
    ) -> Iterator[SourceRecord | DamagedRecord]:
        """Yield every record; raise `CorruptError` at damage that is not accepted."""
        self._skip_blank()
        if self._peek() == "\ufeff":
            self._advance(self._position + 1)
            self._skip_blank()
        if self._peek() != "[":
            self._fail(f"starts with {self._peek()!a}, not with the `[` of a JSON array")
        self._advance(self._position + 1)
        while True:
            self._skip_blank()
            if self._peek() == "]":
                break
            record = self._next_record(accept_damaged=accept_damaged)
            if record is not None:
                yield record
                self.num_records += 1
            if record is None or not self._skip_comma():
                yield self._truncated(accept_truncated=accept_truncated)
                return
        self._advance(self._position + 1)
        self._skip_blank()
        if self._peek():
            self._fail(f"continues with {self._peek()!a} after the end of the JSON array")

    def _next_record(self, *, accept_damaged: bool) -> SourceRecord | DamagedRecord | None:
        """Return the record that starts here, or None if the file ends inside it."""
        parsed = self._parse_value()
        if parsed is None:
            return None
        value, end = parsed
        location = _location(self._path, self.num_records, self._offset)
        damaged = _ESCAPED_BYTE.search(self._text, self._position, end)
        if damaged and not accept_damaged:
            self._advance(damaged.start())
            self._fail("has bytes that are not UTF-8", option="accept_damaged")
        num_bytes = self._advance(end)
        fraction = self._fraction()
        if damaged:
            return DamagedRecord(
                reason=Reason.BROKEN_UTF8, location=location, detail="", fraction_read=fraction
            )
        if num_bytes > self._max_record_bytes:
            return DamagedRecord(
                reason=Reason.TOO_LARGE,
                location=location,
                detail=f"{num_bytes} bytes, limit {self._max_record_bytes}",
                fraction_read=fraction,
            )
        return SourceRecord(value=value, location=location, fraction_read=fraction)

    def _parse_value(self) -> tuple[object, int] | None:
        while True:
            try:
                value, end = self._parse(self._text, self._position)
            except json.JSONDecodeError as error:
                if not _may_be_truncated(error, len(self._text)):
                    self._advance(error.pos)
                    self._fail(f"is not JSON: {error.msg}")
            except RecursionError:
                self._fail("nests too deeply")
            else:
                if end < len(self._text) or self._at_end:  # a number may continue in the next chunk
                    return value, end
            if self._at_end:
                return None
            if len(self._text) - self._position > 4 * self._max_record_bytes:
                self._fail(
                    f"has a record of more than {4 * self._max_record_bytes} bytes",
                    option="max_record_bytes",
                )
            self._fill()

    def _skip_comma(self) -> bool:
        """Step over the comma between records; return False if the file ends inside the array."""
        self._skip_blank()
        following = self._peek()
        if following == ",":
            self._advance(self._position + 1)
        elif following and following != "]":
            self._fail(f"is not JSON: expected `,` or `]` after a record, found {following!a}")
        return bool(following)

    def _skip_blank(self) -> None:
        while True:
            match = _BLANK.match(self._text, self._position)
            self._advance(match.end() if match else self._position)
            if self._position < len(self._text) or self._at_end:
                return
            self._fill()

    def _peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def _advance(self, position: int) -> int:
        """Move forward to character `position` and return the number of bytes passed."""
        passed = self._text[self._position : position]
        num_bytes = len(passed.encode("utf-8", "surrogateescape"))
        self._position = position
        self._offset += num_bytes
        return num_bytes

    def _fill(self) -> None:
        """Read more, twice as much each time inside one record, so that the cost stays linear."""
        rest = self._text[self._position :]
        data = self._file.read(max(_CHUNK_BYTES, len(rest)))
        self._at_end = not data
        self._text = rest + self._decode(data, final=self._at_end)
        self._position = 0

    def _truncated(self, *, accept_truncated: bool) -> DamagedRecord:
        if not accept_truncated:
            self._fail("ends inside its JSON array: it is truncated", option="accept_truncated")
        return DamagedRecord(
            reason=Reason.TRUNCATED,
            location=_location(self._path, self.num_records, self._offset),
            detail=f"the file ends {len(self._text) - self._position} characters later",
            fraction_read=1.0,
        )

    def _fail(self, what: str, *, option: str | None = None) -> NoReturn:
        raise CorruptError(damage(self._path, what, self._offset, self.num_records, option))


def read_json_lines(
    file: BinaryIO,
    *,
    path: str,
    fraction: Fraction,
    max_record_bytes: int,
    accept_truncated: bool,
    accept_damaged: bool,
) -> Iterator[SourceRecord | DamagedRecord]:
    """Yield one record per non-blank line; raise `CorruptError` at unaccepted damage."""
    offset = 0
    num_records = 0
    while line := file.readline(max_record_bytes + 1):
        location = _location(path, num_records, offset)
        start, offset = offset, offset + len(line)
        is_too_large = len(line) > max_record_bytes
        while len(line) > max_record_bytes and not line.endswith(b"\n"):
            line = file.readline(max_record_bytes + 1)
            offset += len(line)
        if not is_too_large and not line.strip():
            continue
        found = (Reason.TOO_LARGE, f"over {max_record_bytes} bytes") if is_too_large else None
        parsed = found or _parse_line(line)
        if isinstance(parsed, SourceValue):
            yield SourceRecord(value=parsed.value, location=location, fraction_read=fraction())
        else:
            reason, detail = parsed
            option = _option_for(reason)
            accepted = {"accept_truncated": accept_truncated, "accept_damaged": accept_damaged}
            if option is not None and not accepted[option]:
                raise CorruptError(damage(path, f"{reason}: {detail}", start, num_records, option))
            yield DamagedRecord(
                reason=reason, location=location, detail=detail, fraction_read=fraction()
            )
        num_records += 1


class SourceValue:
    """The value of a line; wrapped in a class because it may have any type."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def damage(path: str, what: str, offset: int, num_records: int, option: str | None) -> str:
    """Return the message of a `CorruptError`: location, whole records before it, remedy."""
    remedy = f" or set `{option}`" if option else ""
    return (
        f"{path} {what} (byte {offset}, {num_records} whole records before it); "
        f"replace the file{remedy} and run again"
    )


def _location(path: str, record: int, offset: int) -> str:
    return f"{PurePosixPath(path).name}, record {record} at byte {offset}"


def _parse_line(line: bytes) -> SourceValue | tuple[Reason, str]:
    try:
        return SourceValue(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return Reason.BROKEN_UTF8, f"{error.reason} at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        reason = Reason.BROKEN_JSON if line.endswith(b"\n") else Reason.TRUNCATED
        return reason, f"{error.msg} at character {error.pos} of the line"
    except RecursionError:
        return Reason.BROKEN_JSON, "nests too deeply"


def _option_for(reason: Reason) -> str | None:
    if reason is Reason.TOO_LARGE:
        return None  # a limit, not damage
    return "accept_truncated" if reason is Reason.TRUNCATED else "accept_damaged"


def _may_be_truncated(error: json.JSONDecodeError, num_characters: int) -> bool:
    """Return whether more text could resolve the error, unlike a real syntax error."""
    return (
        error.msg.startswith("Unterminated string") or error.pos + _LONGEST_LITERAL > num_characters
    )
