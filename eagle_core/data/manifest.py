"""The manifest of a data set: its source, its contents, and counts of dropped records.

It is written last. A directory without one contains no data set.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eagle_core.errors import ConfigError, CorruptError

MANIFEST_NAME = "manifest.json"


class FileDigest(BaseModel):
    """Expected size and digest of a file of the data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    xxh3_128: str


class SourceCounts(BaseModel):
    """What one of several sources gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_records: int
    num_train: int
    num_held_out: int


class DatasetManifest(BaseModel):
    """One built data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    fingerprint: str
    """sha256 over the content keys of both splits in order: equal if and only if the data is."""
    rules_version: int
    """Version of the cleaning rules that it was built with."""
    config: dict[str, Any]
    """`DatasetConfig.identity()`: the options that determine the contents. For a target's
    answers: the target and its settings, under `regeneration`."""
    source: tuple[dict[str, Any], ...]
    """Every source file with size and digest, or the pinned hub commit, or the data set whose
    questions were answered."""
    num_records: int
    """Records read, damaged ones included: train + held out + dropped."""
    num_train: int
    num_held_out: int
    dropped: dict[str, int] = Field(default_factory=dict)
    """Dropped records, by reason."""
    changed: dict[str, int] = Field(default_factory=dict)
    """Records kept with a change, by change; one record may count more than once."""
    unread: dict[str, int] = Field(default_factory=dict)
    """Kept records with a field that holds something and has no meaning here, by its name."""
    by_source: dict[str, SourceCounts] = Field(default_factory=dict)
    """Counts by the names of `dataset.sources`; the rest of the records was dropped."""
    files: dict[str, FileDigest]

    @property
    def num_conversations(self) -> int:
        """Conversations kept in both splits."""
        return self.num_train + self.num_held_out

    @property
    def is_regenerated(self) -> bool:
        """Return whether a target generated the answers, in the flow `regenerate`."""
        return "regeneration" in self.config

    @property
    def num_dropped(self) -> int:
        """Dropped records, for any reason."""
        return sum(self.dropped.values())


def load_manifest(directory: Path) -> DatasetManifest:
    """Return the manifest in `directory`; raise `ConfigError` without a finished data set."""
    path = directory / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{directory} holds no data set ({MANIFEST_NAME} is missing); run the `dataset` flow"
        ) from error
    try:
        return DatasetManifest.model_validate_json(text)
    except ValidationError as error:
        raise CorruptError(
            f"{path} is not a data set manifest: {error}; delete it and run the `dataset` flow"
        ) from error
