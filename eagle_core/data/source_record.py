"""One record of a source, whole or damaged, with its location."""

from dataclasses import dataclass

from eagle_core.data.ledger import Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecord:
    """A record that could be read."""

    value: object
    """The JSON, Parquet or CSV value; not yet known to be a conversation."""
    location: str
    fraction_read: float
    """Fraction of the source read so far, 0 to 1, for progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedRecord:
    """A record that could not be read and that the configuration allows to drop."""

    reason: Reason
    location: str
    detail: str
    fraction_read: float


def in_source(name: str, location: str) -> str:
    """Return the location of a record in one of several sources."""
    return f"{name}: {location}"


def source_of(location: str) -> str:
    """Return the name of the source in `in_source`; names have no colon."""
    return location.partition(": ")[0]
