"""The target behind an OpenAI-compatible server such as vLLM or SGLang.

What may pass (no connection, a connection cut, a time-out, 408, 425, 429, 5xx, half an answer) is
tried again after a pause that doubles and varies; what cannot pass stops the run or, where it is
about one conversation, is `NoAnswer` with its reason. The API key is sent and never shown.
"""

import asyncio
import json
import logging
import random
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import NoReturn

import httpx

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.tool_calls import parse_tool_calls
from eagle_core.errors import ConfigError, TransientError
from eagle_core.regeneration.answers import Answer, NoAnswer, Question, usable
from eagle_core.regeneration.config import RegenerationConfig

_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
"""Beside every status of 500 and more."""
_NOBODY_MAY = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}
_TOO_LONG = re.compile(r"context.{0,9}length|too long|longer than|max_model_len", re.IGNORECASE)
_LONGEST_PAUSE_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
_DETAIL_CHARS = 300


logger = logging.getLogger(__name__)


class _PassedOver(Exception):  # noqa: N818 - never leaves this module
    """This attempt failed in a way that another may not."""

    def __init__(self, detail: str, *, pause_seconds: float = 0.0, reached: bool = True) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pause_seconds = pause_seconds
        """The least that the server asks to wait."""
        self.reached = reached
        """Whether anybody was there."""


class AnswerServer:
    """A connection to the server; made inside the event loop that asks."""

    def __init__(
        self,
        config: RegenerationConfig,
        *,
        model: str,
        api_key: str | None,
        first_pause_seconds: float = 1.0,
    ) -> None:
        assert config.base_url is not None  # noqa: S101 (that is when there is a server)
        self._config = config
        self._model = model
        self._first_pause_seconds = first_pause_seconds
        self._url = config.base_url.rstrip("/")
        self._was_there = self._has_warned = False
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(config.timeout_seconds, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=config.concurrency),
        )

    @property
    def concurrency(self) -> int:
        """Questions that may be open at a time."""
        return self._config.concurrency

    def identity(self) -> Mapping[str, object]:
        """Return the model's name: nobody here knows more. The address may change."""
        return {"served_model": self._model}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(self, question: Question) -> Answer:
        """Ask until there is an answer, at most `attempts` times.

        Raises:
            NoAnswer: with the reason, `SERVER_ERROR` if every attempt failed.
            TransientError: the server has gone.
            ConfigError: there never was one, or it knows neither the key nor the model.

        """
        body = self._body(question)
        for attempt in range(1, self._config.attempts + 1):
            try:
                return self._read(await self._post(body))
            except _PassedOver as failed:
                self._warn_once(failed)
                if attempt == self._config.attempts:
                    self._give_up(failed)
                pause_seconds = _pause_seconds(
                    attempt, first=self._first_pause_seconds, least=failed.pause_seconds
                )
                await asyncio.sleep(pause_seconds)
        raise AssertionError  # attempts are 1 or more

    def _give_up(self, failed: _PassedOver) -> NoReturn:
        detail = f"{failed.detail} (attempt {self._config.attempts})"
        if not failed.reached:
            kind = TransientError if self._was_there else ConfigError
            raise kind(
                f"no server answers at {self._url}: {detail}; start it or correct "
                "regeneration.base_url, then run again: what is answered is kept"
            )
        raise NoAnswer(Reason.SERVER_ERROR, detail)

    def _warn_once(self, failed: _PassedOver) -> None:
        if not failed.reached and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "no server answers at %s: %s; asking up to %d times",
                *(self._url, failed.detail, self._config.attempts),
            )

    def _body(self, question: Question) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self._model,
            "messages": [_as_sent(message) for message in question.messages],
            "max_tokens": self._config.max_tokens,
            "temperature": self._config.temperature,
            "seed": question.seed,
        }
        if question.tools:
            body["tools"] = json.loads(question.tools)
        if self._config.thinking is not None:  # templates know it by either name
            thinking = self._config.thinking
            body["chat_template_kwargs"] = {"enable_thinking": thinking, "thinking": thinking}
        return body

    async def _post(self, body: Mapping[str, object]) -> object:
        try:
            response = await self._client.post(f"{self._url}/chat/completions", json=body)
        except httpx.TransportError as error:
            reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise _PassedOver(f"{type(error).__name__} {error}".strip(), reached=reached) from error
        self._was_there, self._has_warned = True, False
        status, text = response.status_code, response.text[:_DETAIL_CHARS]
        if status == HTTPStatus.OK:
            try:
                return response.json()
            except ValueError as error:
                raise _PassedOver(f"no JSON: {text!a}") from error
        if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _PassedOver(f"status {status}: {text}", pause_seconds=_retry_after(response))
        if status in _NOBODY_MAY:
            raise ConfigError(
                f"the server at {self._url} refuses model {self._model} with status {status}: "
                f"{text}; correct regeneration.base_url (which usually ends in /v1) or "
                f"regeneration.model, or put its API key into {self._config.api_key_variable}"
            )
        reason = Reason.CONTEXT_TOO_LONG if _TOO_LONG.search(text) else Reason.REQUEST_REFUSED
        raise NoAnswer(reason, f"status {status}: {text}")

    def _read(self, value: object) -> Answer:
        """Return what a completion says; half of one is worth another attempt."""
        try:
            choice = value["choices"][0]  # type: ignore[index]  # any other type ends below
            said, ended = choice["message"], choice["finish_reason"]
            num_tokens = int((value.get("usage") or {}).get("completion_tokens") or 0)  # type: ignore[attr-defined]
            message = Message(
                role="assistant",
                content=said.get("content") or "",
                reasoning_content=said.get("reasoning_content") or said.get("reasoning") or "",
                tool_calls=parse_tool_calls(said.get("tool_calls"), location="the answer"),
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise _PassedOver(f"no completion: {str(value)[:_DETAIL_CHARS]!a}") from error
        except RejectedRecord as error:
            raise NoAnswer(error.reason, error.detail) from error
        if ended == "length" and self._config.cut_answers == "drop":
            raise NoAnswer(Reason.ANSWER_CUT, f"after {num_tokens or 'max_tokens'} tokens")
        return Answer(message=usable(message), num_tokens=num_tokens)


def _as_sent(message: Message) -> dict[str, object]:
    """Return the message without what OpenAI's own API does not know."""
    sent = message.as_openai()
    sent.pop("thinking", None)
    return sent


def _pause_seconds(attempt: int, *, first: float, least: float) -> float:
    """Return a random wait whose mean doubles with every attempt, so that callers spread out."""
    mean = min(first * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
    jittered = random.uniform(mean / 2, mean * 3 / 2)  # noqa: S311 (no secret)
    return max(jittered, min(least, _LONGEST_PAUSE_SECONDS))


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0
