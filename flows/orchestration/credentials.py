"""The root of a recipe's store; credentials of a Prefect block become environment variables.

The environment passes them to the object store's client and the child processes, like variables
that a user sets. They appear in no parameter, record or log.
"""

import logging
import os
from collections.abc import Mapping

import fsspec
import httpx
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL

from flows.config.store import StoreConfig
from flows.errors import ServerUnreachableError
from flows.workspace import Workspace
from storage.errors import ConfigError
from storage.objects.object_store import S3_SCHEMES

VARIABLES = frozenset(
    {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION",
    }
)
_log = logging.getLogger(__name__)
_read: dict[str, Mapping[str, str]] = {}
"""What this process has read of each block."""


def store_root(store: StoreConfig, space: Workspace) -> str:
    """Return the root of the store; the environment holds its credentials from now on.

    Raises:
        ConfigError: there is no such block, or its content is invalid.
        ServerUnreachableError: the server does not answer.

    """
    root = store.root or str(space.store_root)
    if store.credentials is not None:
        if not root.startswith(S3_SCHEMES):
            raise ConfigError(
                f"store.credentials is {store.credentials!r}, but the store at {root} needs none; "
                "set store.root to an s3:// URL, or omit store.credentials"
            )
        use_credentials(store.credentials)
    return root


def use_credentials(name: str | None) -> bool:
    """Set the variables of a block in this process's environment; return whether that changed it.

    Without a name nothing changes. While the server is down, a process goes on with what it read
    before.

    Raises:
        ConfigError: there is no such block, or its content is invalid.
        ServerUnreachableError: the server does not answer, and nothing was read before.

    """
    if name is None:
        return False
    found = _newest_variables(name)
    if all(os.environ.get(variable) == found.get(variable) for variable in VARIABLES):
        return False
    for variable in VARIABLES - found.keys():  # from another block or the parent process
        os.environ.pop(variable, None)
    os.environ.update(found)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # clients cache credentials
    return True


def _newest_variables(name: str) -> Mapping[str, str]:
    try:
        _read[name] = _variables(name)
    except (httpx.TransportError, httpx.HTTPStatusError) as error:
        if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
            raise
        if name not in _read:
            raise ServerUnreachableError(
                f"Prefect block secret/{name} (store.credentials) cannot be read: the server at "
                f"{PREFECT_API_URL.value()} is down ({error}); start it, or correct "
                "PREFECT_API_URL"
            ) from error
        _log.warning("the server is down: secret/%s is used as it was read before", name)
    return _read[name]


def _variables(name: str) -> Mapping[str, str]:
    block = f"Prefect block secret/{name} (store.credentials)"
    try:
        found = Secret.load(name).get()  # type: ignore[union-attr]  # a flow is not a coroutine
    except ValueError as error:  # how Prefect reports a missing block
        raise ConfigError(
            f"{block}: the server at {PREFECT_API_URL.value() or 'this process'} has no block of "
            "that name; docs/guides/s3.md shows how to create it"
        ) from error
    if not isinstance(found, dict) or not found.keys() <= VARIABLES:
        raise ConfigError(
            f"{block} must hold a JSON object with keys of {', '.join(sorted(VARIABLES))}"
        )
    return {key: str(value) for key, value in found.items()}
