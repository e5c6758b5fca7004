"""Requests to a server, and its answers: whole, or as events, each with the time when it came."""

import json
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

import httpx

from eagle_core.errors import ConfigError, TransientError

_PREFIX = "data: "
_DONE = "[DONE]"
_MOST_WORDS = 300


def get_text(client: httpx.Client, path: str) -> str:
    """Return a page of the server.

    Raises:
        ConfigError: the server refuses the request; with its own words.
        TransientError: it failed.

    """
    response = client.get(path)
    _require_ok(response, path)
    return response.text


def post(client: httpx.Client, path: str, body: Mapping[str, object]) -> dict[str, Any]:
    """Return the whole answer. Raises as `get_text` does."""
    response = client.post(path, json=dict(body))
    _require_ok(response, path)
    answer: dict[str, Any] = response.json()
    return answer


def post_stream(
    client: httpx.Client, path: str, body: Mapping[str, object]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield (seconds since the request, event). Raises as `get_text` does.

    An answer that breaks off is a TransientError, too.
    """
    started = time.perf_counter()
    with client.stream("POST", path, json=dict(body)) as response:
        if response.status_code != HTTPStatus.OK:
            response.read()
        _require_ok(response, path)
        for line in response.iter_lines():
            if not line.startswith(_PREFIX):
                continue
            text = line.removeprefix(_PREFIX)
            if text == _DONE:
                return
            event: dict[str, Any] = json.loads(text)
            if "error" in event:
                raise TransientError(f"the server failed at {path}: {text[:_MOST_WORDS]}")
            yield time.perf_counter() - started, event
            if event.get("stop") is True:  # llama.cpp's last one
                return
    raise TransientError(f"the server's answer to {path} breaks off")


def _require_ok(response: httpx.Response, path: str) -> None:
    if response.status_code == HTTPStatus.OK:
        return
    words = response.text[:_MOST_WORDS]
    is_refusal = response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR
    kind = ConfigError if is_refusal else TransientError
    raise kind(f"the server answers {path} with {response.status_code}: {words}")
