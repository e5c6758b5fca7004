"""When a run over many questions ends early: the server refuses or fails one after another.

Refusals of questions come back at once, and answers take seconds. So a row of refusals ends nothing
before the questions in flight have come back: one answer among them, and the run goes on.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from eagle_core.data.ledger import Reason
from eagle_core.errors import TransientError
from eagle_core.regeneration.journal import FinishedConversation

_EQUAL_REFUSALS = 5
"""Without any answer in this run."""
_FAILURES = 20
_KEY_CHARS = 80
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NUMBERED = re.compile(r"(?<!status )\b\w*\d\w*")


class FailuresInARow:
    """Counts what the conversations of one run end with, while they are asked."""

    def __init__(self, concurrency: int) -> None:
        self._max_failures = max(_FAILURES, 2 * concurrency)
        self._num_answered = self._num_errors = self._num_refusals = self._num_equal = 0
        self._kind = ""
        self._in_flight = 0
        self._changed = asyncio.Condition()
        self.last_words = ""
        """Of the latest refusal."""

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Count a conversation as in flight."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            async with self._changed:
                self._changed.notify_all()

    def add(self, finished: FinishedConversation, *, has_new_answers: bool) -> None:
        """Count the outcome of one conversation.

        Raises:
            TransientError: the server failed too many conversations in a row.

        """
        if has_new_answers or not finished.is_asked_again:
            self._num_answered += 1
            self._num_errors = self._num_refusals = self._num_equal = 0
            return
        if finished.failure is Reason.SERVER_ERROR:
            self._num_errors += 1
            self._require_some_success(finished.detail)
            return
        self._num_errors = 0
        kind = _kind(finished)
        self._num_equal = self._num_equal + 1 if kind == self._kind else 1
        self._num_refusals += 1
        self._kind, self.last_words = kind, finished.detail

    async def only_refusals(self) -> bool:
        """Return whether nothing but refusals came back; waits for the questions in flight."""
        async with self._changed:
            await self._changed.wait_for(lambda: not (self._in_flight and self._is_reached))
        return self._is_reached

    @property
    def num_refusals(self) -> int:
        """Refusals since the last answer."""
        return self._num_refusals

    @property
    def _is_reached(self) -> bool:
        if self._num_answered:
            return self._num_equal >= self._max_failures
        return self._num_equal >= _EQUAL_REFUSALS or self._num_refusals >= self._max_failures

    def _require_some_success(self, detail: str) -> None:
        if self._num_errors >= self._max_failures:
            raise TransientError(
                f"the server failed {self._num_errors} conversations in a row, the last with "
                f"{detail}; check its log and run again; finished answers are kept"
            )


def _kind(refused: FinishedConversation) -> str:
    """Return what equal refusals have in common: not numbers, ids and what they quote."""
    words = _NUMBERED.sub("#", _QUOTED.sub("...", refused.detail))
    return f"{refused.failure} {words[:_KEY_CHARS]}"
