"""One file of a hub data set at one commit, downloaded once into the hub's cache."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download

from eagle_core.data.hub.dataset import resolve_commit
from eagle_core.data.hub.errors import hub_errors


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedFile:
    """A file of a data set, on this machine."""

    path: Path
    commit: str


def cached_file(repository: str, name: str, revision: str) -> CachedFile:
    """Return the file `name` of a data set, downloaded unless it is in the cache.

    A revision that already is a commit is not looked up, so that a cached file works offline.

    Raises:
        ConfigError: the hub has no such file, or does not give it.
        TransientError: the hub is unreachable, and the file is not in the cache.

    """
    commit = resolve_commit(repository, revision)
    with hub_errors(repository, f"{name} of {repository}@{commit[:8]}"):
        found = hf_hub_download(repository, name, repo_type="dataset", revision=commit)
    return CachedFile(path=Path(found), commit=commit)
