"""Data sets on the Hugging Face hub, pinned to a commit before the first record is read."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from eagle_core.data.config import DatasetConfig
from eagle_core.data.files.source_file import SourceFile, files_of
from eagle_core.data.hub.errors import hub_errors
from eagle_core.data.source_record import SourceRecord
from eagle_core.errors import ConfigError, MismatchError, TransientError

if TYPE_CHECKING:
    import datasets

FILES_OF_HUB = "hf://datasets/"
_FILES = re.compile(
    rf"{FILES_OF_HUB}(?P<repository>[^/@]+/[^/@]+)"
    r"(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?/(?P<path>.+)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubDataset:
    """One split of a hub data set at one commit."""

    repository: str
    commit: str
    subsets: tuple[str, ...]
    """Configurations, read one after another; empty means the only one."""
    split: str
    streaming: bool = False
    """Whether rows are read over the network as they are needed, and not stored."""

    def identity(self) -> dict[str, object]:
        """Return the fields that identify the content exactly."""
        fields = asdict(self) | {"subsets": list(self.subsets)}
        return {name: value for name, value in fields.items() if name != "streaming"}


def find_hub_dataset(config: DatasetConfig) -> HubDataset:
    """Return the data set with its revision resolved to a commit.

    A revision that already is a commit is not looked up, so that a cached data set works offline.
    Raises `ConfigError` if the hub has no such data set, `TransientError` if it is unreachable.
    """
    repository = config.source.removeprefix("hf:")
    return HubDataset(
        repository=repository,
        commit=resolve_commit(repository, config.revision),
        subsets=config.subsets,
        split=config.split,
        streaming=config.streaming,
    )


def find_hub_files(config: DatasetConfig) -> list[SourceFile]:
    """Return the files that an address `hf://datasets/ORG/NAME[@REVISION]/PATH` names.

    They are read over the network as they are needed. Raises like `find_hub_dataset`.
    """
    address = _FILES.fullmatch(config.source)
    if address is None:
        raise ConfigError(
            f"{config.source} names no file of the hub; expected "
            f"{FILES_OF_HUB}ORG/NAME/PATH, where PATH may be a pattern such as **/*.parquet"
        )
    if address["revision"] and config.revision:
        raise ConfigError(
            f"{config.source} already names a revision: omit dataset.revision={config.revision}"
        )
    revision = unquote(address["revision"] or config.revision or "")
    commit = resolve_commit(address["repository"], revision or None)
    pinned = f"{FILES_OF_HUB}{address['repository']}@{quote(commit, safe='')}/{address['path']}"
    return [replace(file, commit=commit) for file in files_of(pinned)]


def read_hub_dataset(source: HubDataset) -> Iterator[SourceRecord]:
    """Yield the rows; `datasets` downloads them once and maps them into memory afterwards.

    With `streaming`, nothing is stored, and no more is read than the caller takes. Raises
    `ConfigError` for what the hub does not have or does not give, `TransientError` if it is
    unreachable and the data set is not in the cache, and `CorruptError` for damaged files.
    """
    subsets = source.subsets or (None,)
    for number, subset in enumerate(subsets):
        place = "/".join(filter(None, (source.repository, subset, source.split)))
        place = f"{place}@{source.commit[:8]}"
        with hub_errors(source.repository, place):
            rows = _load(source, subset)
            total = _num_rows(rows, source.split)
            for index, row in enumerate(rows):
                fraction = min((index + 1) / total, 1.0) if total else 0.0
                yield SourceRecord(
                    value=row,
                    location=f"{place}, row {index}",
                    fraction_read=(number + fraction) / len(subsets),
                )


def is_gated(repository: str) -> bool:
    """Return whether its conditions must be accepted; raises like `find_hub_dataset`."""
    with hub_errors(repository, repository):
        return bool(HfApi().dataset_info(repository).gated)


def _load(source: HubDataset, subset: str | None) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets  # noqa: PLC0415 (half a second at the start of every flow that reads files)

    if Path(source.repository).exists():
        raise ConfigError(
            f"`datasets` would read the folder {source.repository} of this directory instead of "
            "the hub: run from another directory, or give the paths of its files as `source`"
        )
    rows = datasets.load_dataset(
        source.repository,
        subset,
        split=source.split,
        revision=source.commit,
        streaming=source.streaming,
    )
    if source.streaming:
        return rows
    paths = [Path(file["filename"]) for file in rows.cache_files]
    if any(source.commit not in path.parts for path in paths):
        # `datasets` falls back to any cached commit when the hub does not answer
        raise MismatchError(
            f"{source.repository}: requested commit {source.commit}, but the cache returned "
            f"{paths[0]}; run again when the hub is reachable, or pin the cached commit"
        )
    return rows


def _num_rows(rows: "datasets.Dataset | datasets.IterableDataset", split: str) -> int | None:
    """Return the number of rows; None where the card of a streamed data set does not tell it."""
    told = (rows.info.splits or {}).get(split)
    return told.num_examples if told is not None else None


def resolve_commit(repository: str, revision: str | None) -> str:
    """Return the commit of a revision; one that already is a commit is not looked up.

    Raises `ConfigError` if the hub has no such revision, `TransientError` if it is unreachable.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    what = f"{repository}@{revision}" if revision else repository
    with hub_errors(repository, what):
        try:
            commit = HfApi().dataset_info(repository, revision=revision).sha
        except OfflineModeIsEnabled as error:
            raise ConfigError(
                f"the hub is disabled (HF_HUB_OFFLINE) and {repository} is not pinned; set "
                "`revision` to the cached commit (40 hex digits)"
            ) from error
    if commit is None:
        raise TransientError(f"the hub returned no commit for {repository}; run again")
    return commit
