"""Server-sent events of a completion: a line of JSON for each, and when it came."""

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


def post_stream(
    client: httpx.Client, path: str, body: Mapping[str, object]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield (seconds since the request, event).

    Raises:
        ConfigError: the server refuses the request; with its own words.
        TransientError: it failed, or the answer breaks off.

    """
    started = time.perf_counter()
    with client.stream("POST", path, json=dict(body)) as response:
        if response.status_code != HTTPStatus.OK:
            words = response.read().decode(errors="replace")[:_MOST_WORDS]
            is_refusal = response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR
            kind = ConfigError if is_refusal else TransientError
            raise kind(f"the server answers {path} with {response.status_code}: {words}")
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
