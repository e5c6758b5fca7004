"""Credentials of a block, while the server that keeps it comes and goes."""

import os
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from unittest import mock

import httpx
import pytest

from flows.errors import ServerUnreachableError
from flows.orchestration import credentials
from flows.orchestration.credentials import VARIABLES, use_credentials
from flows.orchestration.retry import RETRYABLE

FIRST = {"AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two"}
SECOND = {"AWS_ACCESS_KEY_ID": "three", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}


def answered(status: int) -> httpx.HTTPStatusError:
    """Return how the client reports an answer that is no block."""
    request = httpx.Request("GET", "http://127.0.0.1:9")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status))


class Blocks:
    """What a server holds; None while it is down."""

    def __init__(self) -> None:
        self.held: Mapping[str, Mapping[str, str]] | None = {"lake": FIRST}
        self.error: Exception = httpx.ConnectError("refused")

    def load(self, name: str) -> SimpleNamespace:
        """Return the block of that name, as `Secret.load`."""
        if self.held is None:
            raise self.error
        return SimpleNamespace(get=lambda: self.held and self.held[name])


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    """Blocks in place of a server's, for a process that has read none."""
    found = Blocks()
    with (
        mock.patch.object(credentials.Secret, "load", found.load),
        mock.patch.object(credentials, "_read", {}),
        mock.patch.dict(os.environ),
    ):
        yield found


def held() -> Mapping[str, str]:
    """Return the variables that are set."""
    return {name: os.environ[name] for name in VARIABLES & os.environ.keys()}


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), answered(503)])
def test_what_was_read_is_used_while_the_server_is_down(
    blocks: Blocks, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    assert use_credentials("lake")
    assert held() == FIRST
    blocks.held = {"lake": SECOND}
    assert use_credentials("lake")
    assert held() == SECOND, "a block may change"
    blocks.held, blocks.error = None, error
    assert not use_credentials("lake")
    os.environ["AWS_ACCESS_KEY_ID"] = "of another batch"
    assert use_credentials("lake")
    assert held() == SECOND
    assert "the server is down: secret/lake is used as it was read before" in caplog.text
    assert "three" not in caplog.text


def test_nothing_was_read_and_the_server_is_down(blocks: Blocks) -> None:
    use_credentials("lake")
    blocks.held = None
    with pytest.raises(ServerUnreachableError, match=r"secret/pond .* is down") as caught:
        use_credentials("pond")
    assert isinstance(caught.value, RETRYABLE)
    assert held() == FIRST


def test_a_server_that_refuses_is_not_down(blocks: Blocks) -> None:
    use_credentials("lake")
    blocks.held, blocks.error = None, answered(403)
    with pytest.raises(httpx.HTTPStatusError):
        use_credentials("lake")


def test_clients_are_kept_while_nothing_changes(blocks: Blocks) -> None:
    with mock.patch.object(credentials.fsspec, "get_filesystem_class") as found:
        cleared = found.return_value.clear_instance_cache
        use_credentials("lake")
        use_credentials("lake")
        assert cleared.call_count == 1
        blocks.held = {"lake": SECOND}
        use_credentials("lake")
        assert cleared.call_count == 2
