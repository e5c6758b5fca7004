"""Data sets on the Hugging Face hub, pinned to a commit before the first record is read."""

import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from eagle_core.data.config import DatasetConfig
from eagle_core.data.source_record import SourceRecord
from eagle_core.errors import ConfigError, MismatchError, TransientError

if TYPE_CHECKING:
    import datasets

_HTTP_CLIENT = "httpx2" if importlib.util.find_spec("httpx2") else "httpx"
_TransportError: type[Exception] = importlib.import_module(_HTTP_CLIENT).TransportError
"""Passed on by huggingface_hub if the hub does not answer; the client was renamed in version 2."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubDataset:
    """One split of a hub data set at one commit."""

    repository: str
    commit: str
    subsets: tuple[str, ...]
    """Configurations, read one after another; empty means the only one."""
    split: str

    def identity(self) -> dict[str, object]:
        """Return the fields that identify the content exactly."""
        return asdict(self) | {"subsets": list(self.subsets)}


def find_hub_dataset(config: DatasetConfig) -> HubDataset:
    """Return the data set with its revision resolved to a commit.

    A revision that already is a commit is not looked up, so that a cached data set works offline.
    Raises `ConfigError` if the hub has no such data set, `TransientError` if it is unreachable.
    """
    repository = config.source.removeprefix("hf:")
    commit = config.revision or ""
    if not _COMMIT.fullmatch(commit):
        commit = _resolve(repository, config.revision)
    return HubDataset(
        repository=repository, commit=commit, subsets=config.subsets, split=config.split
    )


def read_hub_dataset(source: HubDataset) -> Iterator[SourceRecord]:
    """Yield the rows; `datasets` downloads them once and maps them into memory afterwards.

    Raises `ConfigError` for a missing subset or split, `TransientError` if the hub is unreachable
    and the data set is not in the cache.
    """
    subsets = source.subsets or (None,)
    for number, subset in enumerate(subsets):
        rows = _load(source, subset)
        place = "/".join(filter(None, (source.repository, subset, source.split)))
        for index, row in enumerate(rows):
            yield SourceRecord(
                value=row,
                location=f"{place}@{source.commit[:8]}, row {index}",
                fraction_read=(number + (index + 1) / len(rows)) / len(subsets),
            )


def _load(source: HubDataset, subset: str | None) -> "datasets.Dataset":
    import datasets  # noqa: PLC0415 (half a second at the start of every flow that reads files)

    try:
        rows = datasets.load_dataset(
            source.repository, subset, split=source.split, revision=source.commit
        )
    except (ConnectionError, _TransportError) as error:
        raise TransientError(
            f"{source.repository}@{source.commit[:8]} is not in the cache and the hub is "
            f"unreachable: {error}; run again when it is reachable"
        ) from error
    except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConfigError(
            f"{source.repository}@{source.commit[:8]} has no subset {subset or '(default)'} with "
            f"split {source.split}: {error}; correct `subsets` or `split`"
        ) from error
    paths = [Path(file["filename"]) for file in rows.cache_files]
    if any(source.commit not in path.parts for path in paths):
        # `datasets` falls back to any cached commit when the hub does not answer
        raise MismatchError(
            f"{source.repository}: requested commit {source.commit}, but the cache returned "
            f"{paths[0]}; run again when the hub is reachable, or pin the cached commit"
        )
    return rows


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
            f"the hub is disabled (HF_HUB_OFFLINE) and {repository} is not pinned; set `revision` "
            "to the cached commit (40 hex digits)"
        ) from error
    except (HfHubHTTPError, _TransportError) as error:
        raise TransientError(
            f"the hub could not resolve {repository}@{revision or 'main'} to a commit: {error}; "
            "run again, or set `revision` to a commit"
        ) from error
    if commit is None:
        raise TransientError(f"the hub returned no commit for {repository}; run again")
    return commit
