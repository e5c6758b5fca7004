"""Records of one JSON text, streamed in constant memory, each with its byte offset.

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

from eagle_core.data.columns import Columns
from eagle_core.data.files.json_shape import (
    RECORD_KEYS,
    WRAPPER_CHARACTERS,
    RecordList,
    holds_records,
    is_answered,
    list_of_records,
    may_be_truncated,
    starts_objects,
)
from eagle_core.data.files.json_value import TooManyDigits, value_at
from eagle_core.data.ledger import Reason
from eagle_core.data.records.fields import holds_something
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.errors import CorruptError

_CHUNK_BYTES = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_SEEN_CHARACTERS = 256
"""How much of a member is looked at before it is parsed: a list may be larger than any record."""
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
Fraction = Callable[[], float]
"""Returns the fraction of the source that has been read, 0 to 1."""


class JsonReader:
    """Reads the records of a JSON text, one after the other.

    The text is an array of records; an object that wraps one, such as `{"data": [...]}`; or records
    one after another, on any number of lines.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        path: str,
        fraction: Fraction,
        max_record_bytes: int,
        columns: Columns | None = None,
    ) -> None:
        """Read `file`; the configured `columns` tell a record from an object that wraps some."""
        self._file = file
        self._columns = columns
        self._path = path
        self._fraction = fraction
        self._max_record_bytes = max_record_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text = ""
        self._position = 0  # in characters of self._text
        self._offset = 0  # the same position in bytes of the file
        self._at_end = False
        self._accept_truncated = False
        self._accept_damaged = False
        self.num_records = 0

    def read(
        self, *, accept_truncated: bool, accept_damaged: bool
    ) -> Iterator[SourceRecord | DamagedRecord]:
        """Yield every record; raise `CorruptError` at damage that is not accepted."""
        self._accept_truncated = accept_truncated
        self._accept_damaged = accept_damaged
        self._skip_blank()
        if self._peek() == "\ufeff":
            self._advance(self._position + 1)
            self._skip_blank()
        if self._peek() == "[":
            yield from self._array()
            self._check_end("the JSON array")
        elif self._peek() == "{":
            yield from self._objects()
        else:
            self._fail(f"starts with {self._peek()!a}, not with the `[` or `{{` of JSON")

    def _objects(self) -> Iterator[SourceRecord | DamagedRecord]:
        found = self._list_of_records()
        if found is not None:
            if found.other is not None:
                self._second_list(found.other, found)
            self._advance(found.start)
            yield from self._array()
            self._skip_other_members(found)
            self._check_end("the JSON object")
            return
        while self._peek():
            if self._peek() != "{":
                self._check_end("a JSON object")
            record = self._next_record()
            if record is None:
                yield self._truncated()
                return
            yield record
            self.num_records += 1
            self._skip_blank()

    def _array(self) -> Iterator[SourceRecord | DamagedRecord]:
        self._advance(self._position + 1)
        while True:
            self._skip_blank()
            if self._peek() == "]":
                break
            record = self._next_record()
            if record is not None:
                yield record
                self.num_records += 1
            if record is None or not self._skip_comma():
                yield self._truncated()
                return
        self._advance(self._position + 1)

    def _list_of_records(self) -> RecordList | None:
        """Return the list of records in a wrapping object; None if it wraps none."""
        while len(self._text) - self._position < WRAPPER_CHARACTERS and not self._at_end:
            self._fill()
        return list_of_records(self._text, self._position, columns=self._columns)

    def _skip_other_members(self, records: RecordList) -> None:
        """Step over what follows the list of records in a wrapping object, and over its end."""
        members = dict(records.members)
        self._skip_blank()
        while self._peek() == ",":
            self._advance(self._position + 1)
            self._skip_blank()
            name = self._skip_value()
            if self._peek() == ":":
                self._advance(self._position + 1)
                self._skip_blank()
            self._check_member(name, records)
            value = self._skip_value()
            if holds_records(name, value):
                self._second_list(name, records)
            members[str(name)] = holds_something(value) or None
            if not records.fits and is_answered(members, self._columns):
                self._both(name, records)
        if not self._peek():
            self._cut_behind_records()
            return
        if self._peek() != "}":
            self._fail(f"is not JSON: expected `,` or `}}` after a member, found {self._peek()!a}")
        self._advance(self._position + 1)

    def _check_member(self, name: object, records: RecordList) -> None:
        """Raise for a member behind the list that shows at its start what it is."""
        if name in RECORD_KEYS:
            self._both(name, records)
        while len(self._text) - self._position < _SEEN_CHARACTERS and not self._at_end:
            self._fill()
        if starts_objects(self._text, self._position):
            self._second_list(name, records)

    def _both(self, name: object, records: RecordList) -> NoReturn:
        self._fail(
            f"has a list {records.name!a}, as a file of records, and {name!a}, as one record: "
            "for one record, write it as a line of JSON lines and set dataset.format=jsonl; "
            f"for a list of records, leave out {name!a}"
        )

    def _second_list(self, name: object, records: RecordList) -> NoReturn:
        self._fail(
            f"has a second list of records, {name!a}, beside {records.name!a}: write each to its "
            "own file, and leave out a list that has no records"
        )

    def _skip_value(self) -> object:
        parsed = self._parse_value()
        if parsed is None:
            self._cut_behind_records()
            return None
        value, end = parsed
        self._advance(end)
        self._skip_blank()
        return value

    def _cut_behind_records(self) -> None:
        """Go to the end of a file that is cut behind its last record; raise if not accepted."""
        if not self._accept_truncated:
            self._fail("ends inside its JSON object: it is truncated", option="accept_truncated")
        self._position = len(self._text)

    def _check_end(self, of: str) -> None:
        self._skip_blank()
        if self._peek() == "[" and of == "the JSON array":
            self._fail(
                "has several lists, as with a list of turns on each line: write each as an object, "
                'such as {"messages": [...]}'
            )
        if self._peek():
            self._fail(f"continues with {self._peek()!a} after the end of {of}")

    def _next_record(self) -> SourceRecord | DamagedRecord | None:
        """Return the record that starts here, or None if the file ends inside it."""
        parsed = self._parse_value()
        if parsed is None:
            return None
        value, end = parsed
        location = location_of(self._path, self.num_records, self._offset)
        damaged = _ESCAPED_BYTE.search(self._text, self._position, end)
        if damaged and not self._accept_damaged:
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
        if isinstance(value, TooManyDigits):
            return DamagedRecord(
                reason=Reason.TOO_LARGE,
                location=location,
                detail=value.detail,
                fraction_read=fraction,
            )
        return SourceRecord(value=value, location=location, fraction_read=fraction)

    def _parse_value(self) -> tuple[object, int] | None:
        while True:
            try:
                value, end = value_at(self._text, self._position)
            except json.JSONDecodeError as error:
                if not may_be_truncated(error, len(self._text)):
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

    def _truncated(self) -> DamagedRecord:
        if not self._accept_truncated:
            self._fail("ends inside its JSON: it is truncated", option="accept_truncated")
        cut = DamagedRecord(
            reason=Reason.TRUNCATED,
            location=location_of(self._path, self.num_records, self._offset),
            detail=f"the file ends {len(self._text) - self._position} characters later",
            fraction_read=1.0,
        )
        self._position = len(self._text)
        return cut

    def _fail(self, what: str, *, option: str | None = None) -> NoReturn:
        raise CorruptError(damage(self._path, what, self._offset, self.num_records, option))


def damage(path: str, what: str, offset: int, num_records: int, option: str | None) -> str:
    """Return the message of a `CorruptError`: location, whole records before it, remedy."""
    remedy = f" or set `{option}`" if option else ""
    return (
        f"{path} {what} (byte {offset}, {num_records} whole records before it); "
        f"replace the file{remedy} and run again"
    )


def location_of(path: str, record: int, offset: int) -> str:
    return f"{PurePosixPath(path).name}, record {record} at byte {offset}"
