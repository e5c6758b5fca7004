"""The fields of a record's objects, and which of them nothing reads.

Invariant: a field that holds something is either read or named in `Notes.unread`. Tables fill
absent fields with null, so null, blank text and whatever contains only these hold nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from eagle_core.data.ledger import Reason, RejectedRecord


@dataclass(kw_only=True, slots=True)
class Notes:
    """What was left out of one record while it was read."""

    unread: set[str] = field(default_factory=set)
    """Names of fields that hold something and have no meaning here, such as `turn.score`."""
    null_members: bool = False
    """Whether null members were left out of tools or of a call's arguments."""


class Fields:
    """The fields of one object; each is read at most once."""

    def __init__(self, values: Mapping[str, object], *, within: str = "", notes: Notes) -> None:
        """Start with nothing read; `within` leads the names of unread fields, such as `turn.`."""
        self._values = values
        self._within = within
        self._notes = notes
        self._read: set[str] = set()

    @property
    def notes(self) -> Notes:
        """What was left out of the record that this object is a part of."""
        return self._notes

    @property
    def names(self) -> str:
        """Up to eight names of fields, for messages."""
        return ", ".join(sorted(map(str, self._values))[:8])

    def exists(self, name: str) -> bool:
        """Return whether there is such a field, null or not."""
        return name in self._values

    def holds(self, name: str) -> bool:
        """Return whether the field holds something."""
        return holds_something(self._values.get(name))

    def see(self, name: str) -> object:
        """Return a field without reading it; None if it is absent."""
        return self._values.get(name)

    def take(self, *names: str) -> object:
        """Read the first of these fields that holds something, or else the first that is there."""
        there = [name for name in names if self._values.get(name) is not None]
        if not there:
            return None
        name = next(filter(self.holds, there), there[0])
        self._read.add(name)
        return self._values[name]

    def ignore(self, *names: str) -> None:
        """Count these fields as read: nothing is lost without them."""
        self._read.update(names)

    def inner(self, values: Mapping[str, object], within: str) -> "Fields":
        """Return the fields of an object in this one."""
        return Fields(values, within=f"{self._within}{within}.", notes=self._notes)

    def unread(self) -> list[str]:
        """Return the fields that hold something and were not read so far."""
        return [str(name) for name in self._values if name not in self._read and self.holds(name)]

    def finish(self) -> None:
        """Note every field that holds something and was not read."""
        self._notes.unread.update(f"{self._within}{name}" for name in self.unread())


def holds_something(value: object) -> bool:
    """Return whether a value is more than null, blank text and containers of these."""
    if value is None:
        return False
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(holds_something, value.values()))
    if is_list(value):
        return any(map(holds_something, value))
    return True


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Return whether a value is a list, as JSON or Parquet has it."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def without_nulls(value: object) -> object:
    """Return a JSON value without null members of objects; null elements of lists stay."""
    if isinstance(value, Mapping):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(element) for element in value]
    return value


def parsed(value: object) -> object:
    """Return the list or object in a JSON text; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # ValueError also for an integer of too many digits
        return value


def encodable(text: str, location: str) -> str:
    """Return `text`; refuse half a surrogate pair: JSON can escape it, UTF-8 cannot encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RejectedRecord(
            Reason.BROKEN_UTF8, location, f"lone surrogate at character {error.start}"
        ) from error
    return text
