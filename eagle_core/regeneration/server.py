"""The target behind an OpenAI-compatible server such as vLLM or SGLang.

Transient failures (no connection, a dropped connection, a time-out, 408, 425, 429, 5xx, a partial
answer) are retried after a pause that doubles, with jitter. A permanent failure stops the run or,
if it concerns one conversation, raises `NoAnswer` with its reason and the server's own words. The
API key is sent and never shown. A server on this machine is reached without a web proxy.
"""

import asyncio
import json
import logging
import random
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from typing import NoReturn

import httpx

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.errors import ConfigError, TransientError
from eagle_core.regeneration.answers import Answer, NoAnswer, Question
from eagle_core.regeneration.completion import parse_completion
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.server_words import own_words

_TRANSIENT = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
"""In addition to every status from 500 up."""
_FATAL = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}
_TOO_LONG = re.compile(
    r"context.{0,9}(?:length|size|window)|too long|longer than|max_model_len"
    r"|max_new_tokens. must be <=|must have less than \d+ tokens",  # TGI
    re.IGNORECASE,
)
_ABOUT_TEMPLATE = re.compile(
    r"chat_template|template_kwargs|thinking|extra|unknown|unrecogni|unsupported|unexpected"
    r"|not supported|not permitted|not allowed|additional propert",
    re.IGNORECASE,
)
_SAMPLING = {"top_p", "top_k", "repetition_penalty"}
"""Sent to a server that runs already only if they are set: not every server knows them."""
_LONGEST_PAUSE_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
_LOOPBACK = re.compile(r"localhost|.*\.localhost|127(\.\d+){3}|0\.0\.0\.0|::1?")
logger = logging.getLogger(__name__)


class _Retryable(Exception):  # noqa: N818 - never leaves this module
    """This attempt failed; another one may succeed."""

    def __init__(self, detail: str, *, pause_seconds: float = 0.0, reached: bool = True) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pause_seconds = pause_seconds
        """Minimum pause that the server requests."""
        self.reached = reached
        """Whether the server was reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnServer:
    """A server that was started for this run."""

    url: str
    fields: Mapping[str, object]
    """Of each request, under the names of its engine."""
    require_alive: Callable[[], None]
    """Raises TransientError if it has ended; may take seconds."""


class AnswerServer:
    """A connection to the server; created inside the event loop that uses it."""

    def __init__(
        self,
        config: RegenerationConfig,
        *,
        model: str,
        api_key: str | None,
        special_tokens: Collection[str] = (),
        opens_reasoning: bool = False,
        first_pause_seconds: float = 1.0,
        own: OwnServer | None = None,
    ) -> None:
        url = own.url if own else config.base_url
        assert url is not None  # noqa: S101 (set whenever there is a server)
        self._config = config
        self._own = own
        self._model = model
        self._api_key = api_key
        self._special_tokens = special_tokens
        self._opens_reasoning = opens_reasoning
        self._first_pause_seconds = first_pause_seconds
        self._url = url.rstrip("/")
        self._was_reached = self._has_warned = False
        limits = httpx.Limits(max_connections=config.concurrency)
        is_here = _LOOPBACK.fullmatch(httpx.URL(self._url).host)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(config.timeout_seconds, connect=_CONNECT_SECONDS),
            limits=limits,
            # A transport of our own keeps httpx from the proxies that the environment names.
            transport=httpx.AsyncHTTPTransport(limits=limits) if is_here else None,
        )

    @property
    def concurrency(self) -> int:
        """Maximum number of questions in flight."""
        return self._config.concurrency

    def identity(self) -> Mapping[str, object]:
        """Return the model's name: nothing else is known. The address may change."""
        return {"served_model": self._model}

    def ready(self) -> AbstractContextManager[None]:
        """Do nothing: it runs already."""
        return nullcontext()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(self, question: Question) -> Answer:
        """Send the question until it is answered, at most `attempts` times.

        Raises:
            NoAnswer: with the reason, `SERVER_ERROR` if every attempt failed.
            TransientError: the server became unreachable, or it is our own and has ended.
            ConfigError: no server was ever reached, or it refuses the key or the model.

        """
        body = self._body(question)
        for attempt in range(1, self._config.attempts + 1):
            try:
                return self._read(await self._post(body))
            except _Retryable as failed:
                self._warn_once(failed)
                if attempt == self._config.attempts:
                    self._give_up(failed)
                pause_seconds = _pause_seconds(
                    attempt, first=self._first_pause_seconds, least=failed.pause_seconds
                )
                await asyncio.sleep(pause_seconds)
        raise AssertionError  # attempts are 1 or more

    def _give_up(self, failed: _Retryable) -> NoReturn:
        detail = f"{failed.detail} (attempt {self._config.attempts})"
        if not failed.reached:
            kind = TransientError if self._own or self._was_reached else ConfigError
            remedy = "start it or correct regeneration.base_url, then run again"
            raise kind(
                f"no server answers at {self._url}: {detail}; "
                f"{'run again' if self._own else remedy}; finished answers are kept"
            )
        raise NoAnswer(Reason.SERVER_ERROR, detail)

    def _warn_once(self, failed: _Retryable) -> None:
        if not failed.reached and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "no server answers at %s: %s; trying up to %d times",
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
        if self._own:
            body |= self._own.fields
        else:
            body |= self._config.model_dump(include=_SAMPLING, exclude_none=True)
        if self._config.thinking is not None:
            body["chat_template_kwargs"] = template_choice(self._config.thinking)
        return body

    async def _post(self, body: Mapping[str, object]) -> object:
        try:
            response = await self._client.post(f"{self._url}/chat/completions", json=body)
        except httpx.TransportError as error:
            if self._own:
                await asyncio.to_thread(self._own.require_alive)
            reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise _Retryable(f"{type(error).__name__} {error}".strip(), reached=reached) from error
        self._was_reached, self._has_warned = True, False
        said = response.text or response.headers.get("Location") or response.reason_phrase
        status, words = response.status_code, self._words(said)
        if status == HTTPStatus.OK:
            try:
                return response.json()
            except ValueError as error:
                raise _Retryable(f"not JSON: {words}") from error
        if status in _TRANSIENT or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _Retryable(f"status {status}: {words}", pause_seconds=_retry_after(response))
        if status in _FATAL:
            raise ConfigError(
                f"the server at {self._url} refuses model {self._model} with status {status}: "
                f"{words}; {self._remedy_of_refusal()}"
            )
        if _TOO_LONG.search(words):
            raise NoAnswer(Reason.CONTEXT_TOO_LONG, f"status {status}: {words}")
        hint = _likely_cause(body, words)
        raise NoAnswer(Reason.REQUEST_REFUSED, f"status {status}: {words}{hint}")

    def _remedy_of_refusal(self) -> str:
        if self._own:
            return (
                f"it was started by this run, without a key: remove what sets an address or a key "
                f"for {self._config.engine}, such as a variable or a file of its options"
            )
        return (
            "correct regeneration.base_url (which usually ends in /v1) or regeneration.model, or "
            f"set its API key in {self._config.api_key_variable}"
        )

    def _words(self, text: str) -> str:
        return own_words(text, secret=self._api_key)

    def _read(self, value: object) -> Answer:
        """Parse a completion; a partial one is worth another attempt."""
        try:
            return parse_completion(
                value,
                cut_answers=self._config.cut_answers,
                special_tokens=self._special_tokens,
                opens_reasoning=self._opens_reasoning,
                max_tokens=self._config.max_tokens if self._own else None,
            )
        except ValueError as error:
            words = self._words(json.dumps(value))
            raise _Retryable(f"not a completion: {error}: {words}") from error
        except RejectedRecord as error:
            raise NoAnswer(error.reason, error.detail) from error


def template_choice(thinking: bool) -> dict[str, bool]:
    """Return the choice under either name that templates use."""
    return {"enable_thinking": thinking, "thinking": thinking}


def _likely_cause(body: Mapping[str, object], words: str) -> str:
    if "chat_template_kwargs" not in body or not _ABOUT_TEMPLATE.search(words):
        return ""
    return (
        " (likely cause: regeneration.thinking, which is sent as chat_template_kwargs; leave it "
        "empty if this server does not take it)"
    )


def _as_sent(message: Message) -> dict[str, object]:
    """Return the message without the fields that OpenAI's own API does not accept."""
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
