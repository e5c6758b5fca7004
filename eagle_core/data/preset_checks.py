"""Whether a preset can still be read: its source exists and gives conversations.

The first records are read as a run would read them, from the newest commit, and nothing is stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from huggingface_hub.errors import OfflineModeIsEnabled

from eagle_core.data.config import DatasetConfig
from eagle_core.data.hub.dataset import HubDataset, is_gated, read_hub_dataset
from eagle_core.data.ledger import RejectedRecord
from eagle_core.data.normalise import normalise
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.data.sources import find_source, read_records
from eagle_core.errors import ConfigError, EagleCoreError, TransientError

_NUM_RECORDS = 20
"""So many are tried: the first ones may be dropped for a reason of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetFinding:
    """What a preset was found to be."""

    name: str
    is_gated: bool = False
    commit: str = ""
    """The newest commit on the hub; empty for the file of a package, and if it is not known."""
    columns: tuple[str, ...] = ()
    """Of the first record."""
    fault: EagleCoreError | None = None

    @property
    def verdict(self) -> str:
        """`readable`, `dead`, or `unknown` if the hub did not answer."""
        if self.fault is None:
            return "readable"
        return "unknown" if isinstance(self.fault, TransientError) else "dead"


def preset_config(name: str) -> DatasetConfig:
    """Return the settings that a preset stands for."""
    return DatasetConfig(name=name, source=f"preset:{name}")


def check_preset(name: str) -> PresetFinding:
    """Read the first records of every subset of a preset; its fault is returned, not raised.

    Raises `ConfigError` if the hub is switched off: that says nothing about the preset.
    """
    found = PresetFinding(name=name)
    config = preset_config(name)
    try:
        source = find_source(config)
        if not isinstance(source, HubDataset):
            return replace(found, columns=_columns(read_records(config), config))
        found = replace(found, commit=source.commit, is_gated=is_gated(source.repository))
        for subset in source.subsets or (None,):
            only = replace(source, subsets=(subset,) if subset else (), streaming=True)
            found = replace(found, columns=_columns(read_hub_dataset(only), config))
    except EagleCoreError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            raise
        return replace(found, fault=error)
    return found


def _columns(
    records: Iterator[SourceRecord | DamagedRecord], config: DatasetConfig
) -> tuple[str, ...]:
    """Return the columns of the first conversation; raise `ConfigError` if there is none."""
    rejected: RejectedRecord | None = None
    for record in islice(records, _NUM_RECORDS):
        if isinstance(record, DamagedRecord):
            continue
        try:
            normalise(record.value, location=record.location, columns=config.columns)
        except RejectedRecord as error:
            rejected = error
            continue
        return tuple(record.value) if isinstance(record.value, dict) else ()
    raise ConfigError(
        f"{config.source}: none of the first {_NUM_RECORDS} records is a conversation "
        f"({rejected or 'there are none'}); correct the columns of the preset"
    )
