"""The root of a recipe's store; credentials of a Prefect block become environment variables.

The environment passes them to the object store's client and the child processes, like variables
that a user sets. They appear in no parameter, record or log.
"""

import os
from collections.abc import Mapping

import fsspec
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL

from flows.config.store import StoreConfig
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


def store_root(store: StoreConfig, space: Workspace) -> str:
    """Return the root of the store; the environment holds its credentials from now on.

    Raises:
        ConfigError: there is no such block, or its content is invalid.

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


def use_credentials(name: str | None) -> None:
    """Set the variables of a block in this process's environment; do nothing without a name."""
    if name is not None:
        found = _variables(name)
        for variable in VARIABLES - found.keys():  # from another block or the parent process
            os.environ.pop(variable, None)
        os.environ.update(found)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # clients cache credentials


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
