"""Errors that `datasets` and the hub's client raise: the class and the words of each of ours."""

import errno
from collections.abc import Callable

import aiohttp
import httpx
import pytest
from datasets import exceptions
from datasets.table import CastError
from huggingface_hub import errors

from eagle_core.data.hub.errors import hub_errors
from eagle_core.errors import (
    ConfigError,
    CorruptError,
    DiskError,
    EagleCoreError,
    TransientError,
)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def within(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    return error


def in_generation(cause: Exception) -> Exception:
    return caused(
        exceptions.DatasetGenerationError("An error occurred while generating the dataset"), cause
    )


def columns_differ() -> Exception:
    cast = CastError("differ", table_column_names=["a"], requested_column_names=["b"])
    return in_generation(cast)


CASES: dict[str, tuple[Callable[[], Exception], type[EagleCoreError], str]] = {
    "script": (
        lambda: RuntimeError("Dataset scripts are no longer supported, but found set.py"),
        *(ConfigError, "made by a script.*refs/convert/parquet"),
    ),
    "checksum": (
        lambda: exceptions.NonMatchingChecksumError("Checksums didn't match: ['a']"),
        *(CorruptError, "not what its card says.*Checksums didn't match.*hf cache rm"),
    ),
    "split sizes": (
        lambda: exceptions.NonMatchingSplitsSizesError("[]"),
        *(CorruptError, "not what its card says"),
    ),
    "no files": (
        lambda: exceptions.DataFilesNotFoundError("No (supported) data files found"),
        *(ConfigError, "no files that `datasets` reads.*hf://datasets/org/set/"),
    ),
    "gated, by its words": (
        lambda: exceptions.DatasetNotFoundError("Dataset 'org/set' is a gated dataset on the Hub."),
        *(ConfigError, "gated: accept its conditions on .*/datasets/org/set, then set HF_TOKEN"),
    ),
    "not there": (
        lambda: exceptions.DatasetNotFoundError("Dataset 'org/set' doesn't exist"),
        *(ConfigError, "the hub has no org/set/train.*HF_TOKEN"),
    ),
    "subset": (
        lambda: ValueError("BuilderConfig 'none' not found. Available: ['main']"),
        *(ConfigError, r"Available: \['main'\].*correct `subsets` or `split`"),
    ),
    "split": (
        lambda: ValueError("Unknown split \"none\". Should be one of ['train']."),
        *(ConfigError, "correct `subsets` or `split`"),
    ),
    "value of a file": (
        lambda: in_generation(ValueError("Trailing data")),
        *(CorruptError, "cannot be read by `datasets`.*Trailing data"),
    ),
    "columns": (columns_differ, ConfigError, "files of different columns"),
    "columns, as earlier versions say it": (
        lambda: exceptions.DatasetGenerationCastError("All the data files must have the same"),
        *(ConfigError, "files of different columns.*same"),
    ),
    "full disk": (
        lambda: in_generation(OSError(errno.ENOSPC, "No space left on device", "/cache/a")),
        *(DiskError, "No space left on device.*HF_HOME.*dataset.streaming"),
    ),
    "no room": (
        lambda: OSError("Not enough disk space. Needed: 90 GB (download: 45 GB)"),
        *(DiskError, "Needed: 90 GB"),
    ),
    "forbidden folder": (
        lambda: PermissionError(errno.EACCES, "Permission denied", "/cache"),
        *(DiskError, "Permission denied: '/cache'.*HF_HOME"),
    ),
    "package": (
        lambda: ImportError("To support decoding images, please install 'Pillow'."),
        *(ConfigError, "install 'Pillow'"),
    ),
    "connection": (
        lambda: ConnectionError("Couldn't reach 'org/set' on the Hub"),
        *(TransientError, "unreachable: ConnectionError: Couldn't reach.*run again"),
    ),
    "transport": (lambda: httpx.ReadError("reset"), TransientError, "unreachable"),
    "time": (lambda: in_generation(TimeoutError()), TransientError, "unreachable"),
    "payload": (
        lambda: aiohttp.ClientPayloadError("Response payload is not completed"),
        *(TransientError, "payload is not completed"),
    ),
    "offline": (
        lambda: caused(ConnectionError("Couldn't reach"), errors.OfflineModeIsEnabled("offline")),
        *(ConfigError, "HF_HUB_OFFLINE"),
    ),
    "anything": (
        lambda: KeyError("features\nof it"),
        *(CorruptError, "KeyError: 'features"),
    ),
    "after an import that was tried": (
        lambda: within(RuntimeError("no converter"), ImportError("no module")),
        *(CorruptError, "RuntimeError: no converter"),
    ),
    "nothing said": (AssertionError, CorruptError, r"\(AssertionError\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_error_is_one_message(case: str) -> None:
    raised, kind, message = CASES[case]
    with pytest.raises(kind, match=message) as caught, hub_errors("org/set", "org/set/train"):
        raise raised()
    assert type(caught.value) is kind
    assert caught.value.__cause__ is not None
    assert "org/set/train" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_our_own_errors_pass() -> None:
    with pytest.raises(ConfigError, match=r"^as it is$"), hub_errors("org/set", "org/set/train"):
        raise ConfigError("as it is")
