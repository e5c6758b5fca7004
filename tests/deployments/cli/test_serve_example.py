"""The request that `eyas serve` prints."""

import shlex
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deployments.cli.serve_command import _example

URL = "http://127.0.0.1:8000"


def words(engine: str) -> list[str]:
    """Return the words of the printed command."""
    served = SimpleNamespace(target=SimpleNamespace(name="tiny"))
    planned = cast("Any", SimpleNamespace(engine=engine, served=served))
    return shlex.split(_example(planned, URL))


@pytest.mark.parametrize(
    ("engine", "variable", "other"),
    [
        ("vllm", "VLLM_API_KEY", "LLAMA_API_KEY"),
        ("llamacpp", "LLAMA_API_KEY", "VLLM_API_KEY"),
    ],
)
def test_a_key_is_sent_from_its_variable(
    monkeypatch: pytest.MonkeyPatch, engine: str, variable: str, other: str
) -> None:
    monkeypatch.setenv(other, "confidential")
    monkeypatch.delenv(variable, raising=False)
    assert words(engine)[:3] == ["curl", f"{URL}/v1/chat/completions", "-H"]
    assert not any("Authorization" in word for word in words(engine))
    monkeypatch.setenv(variable, "confidential")
    assert f"Authorization: Bearer ${variable}" in words(engine)
    assert not any("confidential" in word for word in words(engine))
    assert words(engine)[-2] == "-d"
