"""Records of JSON lines, streamed in constant memory, each with its byte offset.

A damaged line costs one record: the next one starts behind its line break.
"""

import json
from collections.abc import Iterator
from typing import BinaryIO

from eagle_core.data.files.json_records import Fraction, damage, location_of
from eagle_core.data.files.json_value import TooManyDigits, value_of
from eagle_core.data.ledger import Reason
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.errors import CorruptError


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
        location = location_of(path, num_records, offset)
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


def _parse_line(line: bytes) -> SourceValue | tuple[Reason, str]:
    try:
        value = value_of(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Reason.BROKEN_UTF8, f"{error.reason} at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        reason = Reason.BROKEN_JSON if line.endswith(b"\n") else Reason.TRUNCATED
        return reason, f"{error.msg} at character {error.pos} of the line"
    except RecursionError:
        return Reason.BROKEN_JSON, "nests too deeply"
    if isinstance(value, TooManyDigits):
        return Reason.TOO_LARGE, value.detail
    return SourceValue(value)


def _option_for(reason: Reason) -> str | None:
    if reason is Reason.TOO_LARGE:
        return None  # a limit, not damage
    return "accept_truncated" if reason is Reason.TRUNCATED else "accept_damaged"
