"""Errors of the hub and of `datasets`, which raise anything: one message each, with what helps."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from eagle_core.data.files.source_file import is_away
from eagle_core.errors import (
    ConfigError,
    CorruptError,
    DiskError,
    EagleCoreError,
    TransientError,
)

_WORTH_ANOTHER_TRY = (408, 425, 429)
_NO_SUBSET = re.compile(r"BuilderConfig|Config name|config name|[Uu]nknown split|Bad split")


@contextmanager
def hub_errors(repository: str, what: str) -> Iterator[None]:
    """Turn whatever the hub or `datasets` raises into one of our errors, with its own words.

    `what` is the part of the data set that is asked for, and begins each message.
    """
    try:
        yield
    except EagleCoreError:
        raise
    except Exception as error:
        raise _translated(error, repository, what) from error


def _translated(error: Exception, repository: str, what: str) -> EagleCoreError:
    chain = list(_chain(error))
    words = _words(error)
    page = f"{constants.ENDPOINT}/datasets/{repository}"
    found = _access(chain, words, page, what) or _network(chain, words, what)
    return found or _disk(chain, what) or _of_datasets(chain, words, repository, what)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it: `datasets` hides causes with `raise ... from None`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _access(chain: list[BaseException], words: str, page: str, what: str) -> EagleCoreError | None:
    """Return the error of a data set that is gated, private or not there."""
    if any(isinstance(e, GatedRepoError) for e in chain) or "is a gated dataset" in words:
        return ConfigError(
            f"{what} is gated: accept its conditions on {page}, then set HF_TOKEN to a token of "
            "that account (or `hf auth login`)"
        )
    for error in chain:
        if isinstance(error, RevisionNotFoundError):
            return ConfigError(f"{what} does not exist ({words}); correct `revision`")
        if isinstance(error, RepositoryNotFoundError):
            return ConfigError(
                f"the hub has no data set {what} (or it is private); correct `source`, or set "
                "HF_TOKEN to a token that may read it"
            )
    return None


def _network(chain: list[BaseException], words: str, what: str) -> EagleCoreError | None:
    if any(isinstance(error, OfflineModeIsEnabled) for error in chain):
        return ConfigError(
            f"{what}: the hub is disabled (HF_HUB_OFFLINE), and this is not in the cache; unset "
            "HF_HUB_OFFLINE, or use data that is here"
        )
    for error in chain:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status is not None and status < 500 and status not in _WORTH_ANOTHER_TRY:
            return ConfigError(
                f"{what}: the hub refuses with status {status} ({words}); correct `source`, or set "
                "HF_TOKEN to a token that may read it"
            )
        if status is not None or is_away(error):
            return TransientError(
                f"{what} is not in the cache and the hub is unreachable: {words}; run again when "
                "it is reachable"
            )
    return None


def _disk(chain: list[BaseException], what: str) -> EagleCoreError | None:
    for error in chain:
        if not isinstance(error, OSError):
            continue
        if error.errno not in (None, errno.ENOENT) or "Not enough disk space" in str(error):
            return DiskError(
                f"{what} cannot be stored in the cache: {_words(error)}; free space, or set "
                f"HF_HOME (now {constants.HF_HOME}) to a disk that has it, or set "
                "dataset.streaming, which stores nothing"
            )
    return None


def _of_datasets(
    chain: list[BaseException], words: str, repository: str, what: str
) -> EagleCoreError:
    """Return what an error of `datasets` means; its classes are told by name, to load it late."""
    # Not what an error was raised in the handling of: that may be an import that was only tried.
    direct = (chain[0], chain[0].__cause__)
    kinds = {kind.__name__ for error in direct for kind in type(error).__mro__}
    by_name = f"read its files by name (`source: hf://datasets/{repository}/*.parquet`)"
    access = "correct `source` or `revision`, or set HF_TOKEN to a token that may read it"
    nothing = f"{what} has no files that `datasets` reads ({words}); {by_name}"
    differ = f"{what} has files of different columns ({words}); set `subsets` or {by_name}"
    messages = {
        "DataFilesNotFoundError": nothing,
        "EmptyDatasetError": nothing,
        "DatasetNotFoundError": f"the hub has no {what} ({words}); {access}",
        "ImportError": f"{what}: {words}; install the package that it names, then run again",
        "CastError": differ,
        "DatasetGenerationCastError": differ,
    }
    for kind, message in messages.items():
        if kind in kinds:
            return ConfigError(message)
    if "Dataset scripts are no longer supported" in words:
        return ConfigError(
            f"{what} is made by a script, which `datasets` no longer runs; set dataset.revision="
            "refs/convert/parquet (the hub's own Parquet copy), or use a Parquet mirror"
        )
    if _NO_SUBSET.search(words):
        return ConfigError(f"{what} does not exist: {words}; correct `subsets` or `split`")
    again = f"delete it with `hf cache rm dataset/{repository}` and run again"
    is_other = {"ChecksumVerificationError", "SplitsVerificationError"} & kinds
    fault = "is not what its card says" if is_other else "cannot be read by `datasets`"
    causes = "; ".join(dict.fromkeys(map(_words, chain[:3])))
    return CorruptError(f"{what} {fault} ({causes}); {again}; if that does not help, {by_name}")
