"""Disk and server errors as this package's errors; absence stays `FileNotFoundError`."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from storage.errors import ConfigError, OutOfSpaceError, TransientError
from storage.objects.server_answers import explained

UNUSABLE = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def translated(where: str, *, is_local: bool) -> Iterator[None]:
    """Translate errors of the block into errors that name `where`, a path or a URL."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ConfigError(
            f"cannot use {where}: {error}; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile, where this runs"
        ) from error
    except (BotoCoreError, ClientError, aiohttp.ClientError) as error:
        found = explained(error, where)
        what = f"{where}: {type(error).__name__}: {error}"
        raise (found or TransientError(what)) from error
    except OSError as error:
        if _precondition_failed(error):
            raise FileExistsError(error.errno, str(error), where) from error
        answered = explained(error, where)
        if answered is not None:
            raise answered from error
        if isinstance(error, FileExistsError) and not is_local:
            raise
        if error.errno in FULL:
            raise OutOfSpaceError(
                f"no space left to write {where}: {error.strerror}; free space or raise the "
                "quota, then run the same command again: it resumes where it stopped"
            ) from error
        if isinstance(error, UNUSABLE) or error.errno in {errno.ENOSYS, errno.EROFS}:
            raise ConfigError(f"cannot use {where}: {error}") from error
        raise TransientError(f"{where}: {type(error).__name__}: {error}") from error


def _precondition_failed(error: OSError) -> bool:
    """Return whether a server refused to create what exists; s3fs does not always notice."""
    cause = error.__cause__
    return (
        isinstance(cause, ClientError)
        and cause.response.get("Error", {}).get("Code") == "PreconditionFailed"
    )
