"""Write the ledger: counts by reason, and one row per dropped or changed record."""

from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from eagle_core.data.ledger import Change, LedgerEntry, RejectedRecord
from eagle_core.data.row_writer import RowWriter

LEDGER_SCHEMA = pa.schema([(field.name, pa.string()) for field in fields(LedgerEntry)])


class LedgerWriter:
    """Context manager for one cleaning or tokenising run; `drop` fits `on_rejected`."""

    def __init__(self, path: Path) -> None:
        self._rows = RowWriter(path, LEDGER_SCHEMA)
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()

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
        self._rows.__exit__(kind, error, traceback)

    def drop(self, rejected: RejectedRecord, *, conversation_id: str = "") -> None:
        """Enter a dropped record."""
        self.dropped[rejected.reason.value] += 1
        self._rows.add(asdict(LedgerEntry.of(rejected, conversation_id=conversation_id)))

    def change(
        self, change: Change, *, location: str, conversation_id: str, detail: str = ""
    ) -> None:
        """Enter a record that was kept with a change."""
        self.enter_change(
            LedgerEntry.of_change(
                change, location=location, conversation_id=conversation_id, detail=detail
            )
        )

    def enter_change(self, entry: LedgerEntry) -> None:
        """Enter a change that another process found."""
        self.changed[entry.reason] += 1
        self._rows.add(asdict(entry))
