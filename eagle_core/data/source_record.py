"""One record as it stands in a source, whole or damaged, with the place where it was found."""

from dataclasses import dataclass

from eagle_core.data.ledger import Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecord:
    """A record that could be read."""

    value: object
    """What the JSON, Parquet or CSV holds; not yet known to be a conversation."""
    location: str
    fraction_read: float
    """0 to 1: how much of the source has been read, for progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedRecord:
    """A record that could not be read and that the configuration allows to leave out."""

    reason: Reason
    location: str
    detail: str
    fraction_read: float
