"""Where the records of a JSON file are: on a line each, one after another, or in a wrapping object.

Decided from the beginning of the file alone, so that it is read in constant memory.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from eagle_core.data.columns import Columns, Fit
from eagle_core.data.files.json_value import value_at, value_of
from eagle_core.data.records.fields import Fields, Notes, holds_something

_MEMBER = re.compile(r'\s*[{,]\s*"([^"\\]*)"\s*:\s*')
_FIRST_OBJECT = re.compile(r"\[\s*\{")
WRAPPERS = frozenset(
    {
        *("data", "dataset", "rows", "records", "examples", "samples", "items", "instances"),
        *("entries", "conversations", "train", "training", "validation", "valid", "dev", "test"),
    }
)
"""Names of the list of records in a wrapping object."""
RECORD_KEYS = frozenset(
    {
        *("messages", "conversation", "turns", "dialogue", "input_ids"),
        *("prompt", "question", "instruction", "query", "problem", "message_1"),
        *("response", "completion", "answer", "output", "solution", "chosen", "message_2"),
    }
)
"""Names of what one record holds: an object that has one is no wrapping object."""
_OF_TURNS = frozenset({"role", "from", "content", "value"})
"""Keys of a turn: a list of turns is part of one record."""
_LACKING = frozenset({None, Fit.NONE, Fit.QUESTION})
"""Where a list may be one of turns: its first object does not show all configured columns."""
WRAPPER_CHARACTERS = 1 << 15
"""A list of records starts within this many characters of its file."""
_LONGEST_LITERAL = 16
"""A syntax error this close to the end of the text may be a truncated literal or escape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordList:
    """The list of records in a wrapping object."""

    name: str
    start: int
    """Position of its bracket in the text."""
    other: str | None
    """Name of another list of objects before it."""
    members: Mapping[str, bool | None]
    """The members up to this one, which is included: True if one holds something, or else None."""
    fits: bool
    """Whether its first record has the configured columns, or is cut before it shows."""


def list_of_records(
    text: str, start: int = 0, *, columns: Columns | None = None
) -> RecordList | None:
    """Return the list of records in the object that starts at `start`.

    `text` may end anywhere. None if the object is a record itself, as far as the text shows: by
    its keys, or by the configured `columns`, which hold something in it and not in the list.
    """
    position = start
    found = other = None
    members: dict[str, bool | None] = {}
    while member := _MEMBER.match(text, position):
        name, position = member[1], member.end()
        first = _FIRST_OBJECT.match(text, position)
        fit = _fit_at(text, first.end() - 1, columns) if first else None
        is_turns = first and fit in _LACKING and _is_turn(text, first.end() - 1)
        if name in RECORD_KEYS or is_turns:
            return None
        members[name] = True  # unless it is whole and empty
        if first and name in WRAPPERS and not (found and (found.fits or fit is Fit.NONE)):
            found = RecordList(
                name=name,
                start=position,
                other=other,
                members=dict(members),
                fits=fit is not Fit.NONE,
            )
        other = name if first else other
        try:
            value, position = value_at(text, position)
        except (json.JSONDecodeError, RecursionError):
            break
        members[name] = holds_something(value) or None
    if found and not found.fits and is_answered(members, columns):
        return None
    return found


def is_answered(members: Mapping[str, object], columns: Columns | None) -> bool:
    """Return whether an object holds the question and the answer of the configured columns."""
    return _fit(members, columns) is Fit.ANSWERED


def _fit(members: Mapping[str, object], columns: Columns | None) -> Fit:
    return columns.fit(Fields(members, notes=Notes())) if columns else Fit.NONE


def _fit_at(text: str, start: int, columns: Columns | None) -> Fit | None:
    """Return how the object that starts at `start` fits the columns; None if the text ends in it.

    Without columns, none fits.
    """
    try:
        value, _ = value_at(text, start)
    except (json.JSONDecodeError, RecursionError):
        value = None
    if isinstance(value, dict) or columns is None:
        return _fit(value if isinstance(value, dict) else {}, columns)
    return None


def holds_records(name: object, value: object) -> bool:
    """Return whether a member beside the list of records holds more of them."""
    if isinstance(value, dict) and name in WRAPPERS:
        return any(map(_has_objects, value.values()))
    return _has_objects(value)


def _has_objects(value: object) -> bool:
    """Return whether a value is a list with objects, or with lists that have some."""
    if not isinstance(value, list):
        return False
    return any(isinstance(one, dict) or _has_objects(one) for one in value)


def starts_objects(text: str, start: int) -> bool:
    """Return whether a list that begins with an object starts at `start`."""
    return _FIRST_OBJECT.match(text, start) is not None


def _is_turn(text: str, start: int) -> bool:
    """Return whether the object at `start` is a turn; by its first key if the text ends in it."""
    keys: set[str] = {member[1] for member in [_MEMBER.match(text, start)] if member}
    try:
        turn, _ = value_at(text, start)
    except (json.JSONDecodeError, RecursionError):
        turn = None
    return not _OF_TURNS.isdisjoint(turn if isinstance(turn, dict) else keys)


def spans_lines(text: str, *, is_whole: bool, columns: Columns | None = None) -> bool:
    """Return whether a text of JSON objects has them on other places than one on each line.

    `text` is the beginning of the file; `is_whole` says that it is all of it; `columns` are
    as for `list_of_records`. A damaged line does not make a file of lines another one.
    """
    line, _, rest = text.partition("\n")
    if len(line) == len(text):
        if list_of_records(text, columns=columns) is not None or _follows_another(text):
            return True
        if not is_whole:
            return False
    if _is_json(line):
        return not rest.strip() and is_whole
    opens = line.rstrip().endswith(("{", "["))
    try:
        _, end = value_at(text)
    except json.JSONDecodeError as error:
        is_cut = may_be_truncated(error, len(text.rstrip()))
        return is_cut and (not is_whole or opens or rest.lstrip().startswith('"'))
    except RecursionError:
        return False
    return end > len(line)


def _follows_another(text: str) -> bool:
    """Return whether a second object stands behind the first, as with line breaks of old Macs."""
    try:
        _, end = value_at(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return text[end:].lstrip().startswith("{")


def _is_json(text: str) -> bool:
    try:
        value_of(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def may_be_truncated(error: json.JSONDecodeError, num_characters: int) -> bool:
    """Return whether more text could resolve the error, unlike a real syntax error."""
    return (
        error.msg.startswith("Unterminated string") or error.pos + _LONGEST_LITERAL > num_characters
    )
