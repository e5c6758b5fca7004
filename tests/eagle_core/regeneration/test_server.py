"""What the server's words become, and which servers are asked at all."""

import json
import time
from pathlib import Path

import pytest

from eagle_core.errors import ConfigError
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.regenerate import Regeneration
from eagle_core.regeneration.server import AnswerServer, OwnServer
from tests.eagle_core.regeneration.answer_server import Body, serving
from tests.eagle_core.regeneration.runs import Make, ask, ledger, questions

VLLM = {
    "error": {
        "message": "1 validation error: chat_template_kwargs: Extra inputs are not permitted",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }
}
FASTAPI = {
    "detail": [
        {
            "type": "extra_forbidden",
            "loc": ["body", "chat_template_kwargs"],
            "msg": "Extra inputs are not permitted",
            "input": {"enable_thinking": False},
        }
    ]
}
OPENAI = {"error": {"message": "Unknown parameter: 'chat_template_kwargs'.", "code": "unknown"}}


def refuses_template_kwargs(said: object) -> object:
    def fault(_times: int, body: Body) -> tuple[int, str] | None:
        return (400, json.dumps(said)) if "chat_template_kwargs" in body else None

    return fault


@pytest.mark.parametrize("said", [VLLM, FASTAPI, OPENAI])
def test_a_server_that_refuses_a_setting_ends_the_run_with_its_words(
    made: Make, tmp_path: Path, said: object
) -> None:
    source = made(questions(45))
    fault = refuses_template_kwargs(said)
    with serving(fault=fault) as server:  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as caught:
            ask(server, source, tmp_path / "out", thinking=False)
        assert "questions in a row had no answer" in str(caught.value)
        assert "status 400: " in str(caught.value)
        assert "chat_template_kwargs" in str(caught.value)
        assert "regeneration.thinking" in str(caught.value)
        assert "max_tokens" not in str(caught.value)
        assert server.asked.total() <= 5 + 4
        assert not (tmp_path / "out" / "manifest.json").exists()
        done = ask(server, source, tmp_path / "out")  # as the message advises
    assert done.num_answered == 45


def test_another_refusal_does_not_blame_the_setting(made: Make, tmp_path: Path) -> None:
    words = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'
    said = (400, json.dumps({"object": "error", "message": words}))
    with serving(fault=lambda _times, _body: said) as server, pytest.raises(ConfigError) as caught:
        ask(server, made(questions(20)), tmp_path / "out", thinking=True)
    assert words in str(caught.value)
    assert "regeneration.thinking" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": "model is loading"}, "model is loading"),
        ({"error": {"message": "bad\n  seed"}}, "bad seed"),
        ({"message": "no", "type": "BadRequestError"}, "no"),
        ({"detail": "Not allowed"}, "Not allowed"),
        ("<html>Proxy Error</html>", "<html>Proxy Error</html>"),
        ({"error": {"message": "x" * 5000}}, "x" * 300 + "..."),
        ({"error": {"message": "the key s3cret-key is not for this"}}, "the key *** is not for"),
        ("", "status 422: "),
    ],
)
def test_the_servers_words_are_bounded_and_hold_no_key(
    made: Make, tmp_path: Path, body: object, words: str
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    with (
        serving(fault=lambda _times, _body: (422, text)) as server,
        pytest.raises(ConfigError) as caught,
    ):
        ask(server, made(questions(8)), tmp_path / "out", key="s3cret-key")
    assert words in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert len(str(caught.value)) < 800
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"s3cret" in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 16 tokens. However, you requested 20 tokens.",
        "the request exceeds the available context size (4096 tokens), try increasing it",
        "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000",
        "Please reduce the length: context_length_exceeded",
    ],
)
def test_a_conversation_that_is_too_long_is_one_of_many(
    made: Make, tmp_path: Path, words: str
) -> None:
    def fault(_times: int, body: Body) -> tuple[int, str] | None:
        number = int(body["messages"][0]["content"].split()[1].partition(".")[0])
        return (400, json.dumps({"error": {"message": words}})) if number < 20 else None

    with serving(fault=fault) as server:
        done = ask(server, made(questions(30)), tmp_path / "out")
        assert done.manifest.dropped == {"context_too_long": 20}
        assert ask(server, tmp_path / "questions", tmp_path / "out").num_asked == 0
    assert words in ledger(tmp_path / "out")[0]["detail"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_machine_is_reached_without_a_proxy(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving() as server:
        server.url = server.url.replace("127.0.0.1", host)
        done = ask(server, made(questions(5)), tmp_path / "out", attempts=1)
    assert done.num_answered == 5


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://[::1]:9/v1"])
def test_a_server_that_is_not_there_is_said_at_once_with_one_attempt(
    made: Make, tmp_path: Path, url: str
) -> None:
    config = RegenerationConfig(base_url=url, attempts=1)
    answers = AnswerServer(config, model="m", api_key=None)
    source, started = made(questions(5)), time.monotonic()
    with pytest.raises(ConfigError, match="no server answers at"):  # the task is not retried
        Regeneration(config, answers, source=source, out_dir=tmp_path / "out").run()
    assert time.monotonic() - started < 30


def test_limits_are_sent_only_if_they_are_set(made: Make, tmp_path: Path) -> None:
    source = made(questions(5))
    names = ("top_p", "top_k", "repetition_penalty")
    with serving() as server:
        ask(server, source, tmp_path / "out")
        assert not any(name in body for body in server.requests for name in names)
        server.requests.clear()
        ask(server, source, tmp_path / "more", temperature=0.5, top_p=0.9, top_k=7)
    assert {tuple(body.get(name) for name in names) for body in server.requests} == {(0.9, 7, None)}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_by_an_own_server_advises_nothing_about_another(
    made: Make, tmp_path: Path, status: int
) -> None:
    config = RegenerationConfig(engine="vllm")
    with serving(fault=lambda _times, _body: (status, "no")) as server:
        own = OwnServer(url=server.url, fields={}, require_alive=lambda: None)
        answers = AnswerServer(config, model="m", api_key=None, own=own)
        regeneration = Regeneration(
            config, answers, source=made(questions(5)), out_dir=tmp_path / "out"
        )
        with pytest.raises(ConfigError, match=f"status {status}: no; it was started by") as caught:
            regeneration.run()
    assert "base_url" not in str(caught.value)
    assert "OPENAI_API_KEY" not in str(caught.value)
