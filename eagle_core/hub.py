"""Data sets of the Hugging Face hub, pinned to a commit before the first record is read."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import datasets
import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from eagle_core.dataset_config import DatasetConfig
from eagle_core.errors import ConfigError, TransientError
from eagle_core.source_record import SourceRecord

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubDataset:
    """One split of a hub data set at one commit."""

    repository: str
    commit: str
    subset: str | None
    split: str

    def identity(self) -> dict[str, object]:
        """Return what names the content exactly."""
        return asdict(self)


def find_hub_dataset(config: DatasetConfig) -> HubDataset:
    """Return the data set with its revision resolved to a commit.

    A revision that already is a commit is not looked up, so that a cached data set works offline.
    Raises `ConfigError` if the hub knows no such data set, `TransientError` if it cannot be asked.
    """
    repository = config.source.removeprefix("hf:")
    commit = config.revision or ""
    if not _COMMIT.fullmatch(commit):
        commit = _resolve(repository, config.revision)
    return HubDataset(
        repository=repository, commit=commit, subset=config.subset, split=config.split
    )


def read_hub_dataset(source: HubDataset) -> Iterator[SourceRecord]:
    """Yield the rows; `datasets` downloads them once and maps them into memory afterwards."""
    rows = datasets.load_dataset(
        source.repository, source.subset, split=source.split, revision=source.commit
    )
    num_rows = max(len(rows), 1)
    for index, row in enumerate(rows):
        yield SourceRecord(
            value=row,
            location=f"{source.repository}@{source.commit[:8]}/{source.split}, row {index}",
            fraction_read=(index + 1) / num_rows,
        )


def _resolve(repository: str, revision: str | None) -> str:
    try:
        commit = HfApi().dataset_info(repository, revision=revision).sha
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"the hub has no data set {repository} (or it is private); correct `source`, or set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ConfigError(
            f"the hub is switched off (HF_HUB_OFFLINE) and {repository} is not pinned; set "
            "`revision` to the commit (40 hex digits) that is in the cache"
        ) from error
    except (HfHubHTTPError, httpx.TransportError) as error:
        raise TransientError(
            f"the hub could not say which commit {repository}@{revision or 'main'} is: {error}; "
            "run again, or set `revision` to a commit"
        ) from error
    if commit is None:
        raise TransientError(f"the hub named no commit for {repository}; run again")
    return commit
