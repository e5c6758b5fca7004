"""Write the ledger: a row per dropped or changed record, one per unread field, and counts."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from eagle_core.data.ledger import Change, LedgerEntry, RejectedRecord
from eagle_core.data.row_writer import RowWriter

_NUM_LOCATIONS = 3
_MAX_NAMES = 200
_OTHER_NAMES = "(further fields)"
_MAX_NAME_CHARS = 80
LEDGER_SCHEMA = pa.schema([(field.name, pa.string()) for field in fields(LedgerEntry)])


class LedgerWriter:
    """Context manager for one cleaning or tokenising run; `drop` fits `on_rejected`."""

    def __init__(self, path: Path) -> None:
        self._rows = RowWriter(path, LEDGER_SCHEMA)
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._unread: dict[str, _Column] = {}
        self._filled = _Column()

    def __enter__(self) -> Self:
        """Open the file for entries."""
        self._rows.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Complete the file, or remove it after an error."""
        if kind is None:
            self._enter_columns()
        self._rows.__exit__(kind, error, traceback)

    def drop(self, rejected: RejectedRecord, *, conversation_id: str = "") -> None:
        """Enter a dropped record."""
        self.dropped[rejected.reason.value] += 1
        self._add(LedgerEntry.of(rejected, conversation_id=conversation_id))

    def change(
        self, change: Change, *, location: str, conversation_id: str, detail: str = ""
    ) -> None:
        """Enter a record that was kept with a change."""
        if change is Change.NULL_MEMBERS_DROPPED:  # concerns every record of a table
            self.changed[change.value] += 1
            self._filled.add(location)
            return
        self.enter_change(
            LedgerEntry.of_change(
                change, location=location, conversation_id=conversation_id, detail=detail
            )
        )

    def enter_change(self, entry: LedgerEntry) -> None:
        """Enter a change that another process found."""
        self.changed[entry.reason] += 1
        self._add(entry)

    @property
    def unread(self) -> dict[str, int]:
        """Number of kept records by name of a field that holds something and is not read."""
        return {name: column.num_records for name, column in sorted(self._unread.items())}

    def leave_unread(self, names: Iterable[str], *, location: str) -> None:
        """Count fields of a kept record that are not read.

        At most 200 names are told apart: ids may be names.
        """
        stored = {_storable(name)[:_MAX_NAME_CHARS] for name in names}
        is_known = len(self._unread) < _MAX_NAMES
        for name in {name if is_known or name in self._unread else _OTHER_NAMES for name in stored}:
            self._unread.setdefault(name, _Column()).add(location)

    def _enter_columns(self) -> None:
        for name, column in sorted(self._unread.items()):
            self._add(column.entry(action="unread", reason=name))
        if self._filled.num_records:
            self._add(self._filled.entry(action="changed", reason=Change.NULL_MEMBERS_DROPPED))

    def _add(self, entry: LedgerEntry) -> None:
        self._rows.add({name: _storable(text) for name, text in asdict(entry).items()})


@dataclass(kw_only=True, slots=True)
class _Column:
    """Records that one entry stands for."""

    num_records: int = 0
    locations: list[str] = field(default_factory=list)
    """The first of them."""

    def add(self, location: str) -> None:
        self.num_records += 1
        if len(self.locations) < _NUM_LOCATIONS:
            self.locations.append(location)

    def entry(self, *, action: str, reason: str) -> LedgerEntry:
        count = "1 record" if self.num_records == 1 else f"{self.num_records:,} records"
        others = f", also {'; '.join(self.locations[1:])}" if self.locations[1:] else ""
        return LedgerEntry(
            location=self.locations[0],
            conversation_id="",
            action=action,
            reason=str(reason),
            detail=f"{count}{others}",
        )


def _storable(text: str) -> str:
    """Return `text` with lone surrogates escaped: names of fields may have them."""
    return text.encode("utf-8", "backslashreplace").decode()
