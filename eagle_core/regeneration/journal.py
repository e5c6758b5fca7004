"""The journal of answers: one line per conversation, on disk before it counts.

A conversation whose next question is asked again has a line too: it goes on after its answers. A
later line replaces an earlier one.

A line is the xxh3_64 of its JSON, a space and the JSON. A line that does not match its digest (the
last line of a killed run, a damaged one) is ignored: that conversation is regenerated. One process
writes at a time.
"""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.regeneration.answers import ASKED_AGAIN, starts_unclosed_reasoning

_DIGEST_CHARS = 16


class FinishedConversation(BaseModel):
    """The target's answers in one conversation, and why they ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Content key of the source conversation."""
    conversation_id: str
    answers: tuple[Message, ...]
    """In order; fewer than the conversation has assistant turns if it ended early."""
    failure: Reason | None = None
    """Why the next answer is missing; None if none is missing, or after a tool call."""
    detail: str = ""
    num_tokens: int = 0
    context_tokens: int | None = None
    """`regeneration.context_tokens` where that was too short for the next question."""

    @property
    def is_asked_again(self) -> bool:
        """Whether the next run asks for the missing answer again."""
        return self.failure in ASKED_AGAIN

    def without_cut_reasoning(self) -> Self:
        """Return the answers before one that is reasoning without an end.

        Earlier versions took it for an answer.
        """
        for index, answer in enumerate(self.answers):
            if starts_unclosed_reasoning(answer.content) and not answer.reasoning_content:
                update = {
                    "answers": self.answers[:index],
                    "failure": Reason.ANSWER_CUT,
                    "detail": f"answer {index} ends inside the reasoning",
                }
                return self.model_copy(update=update)
        return self

    def without_other_context(self, context_tokens: int | None) -> Self:
        """Return the answers as if nothing followed, if another context was too short for more."""
        if self.failure is not Reason.CONTEXT_TOO_LONG or self.context_tokens == context_tokens:
            return self
        return self.model_copy(update={"failure": None, "detail": "", "context_tokens": None})


class AnswerJournal:
    """Context manager that holds the journal's lock; only file offsets are in memory."""

    def __init__(self, path: Path, *, context_tokens: int | None = None) -> None:
        self.path = path
        self._context_tokens = context_tokens
        self._offsets: dict[bytes, int] = {}
        self.num_damaged = 0
        """Lines that did not match their digest when the journal was opened."""

    def __enter__(self) -> Self:
        """Lock, read, and complete the partial line of a killed run; ConfigError if in use."""
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(
                f"{self.path} is in use: another run answers the same questions; wait for it"
            ) from error
        self._index()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lock."""
        self._file.close()

    def __contains__(self, key: str) -> bool:
        """Return whether there is a line of the conversation with this content key."""
        return bytes.fromhex(key) in self._offsets

    def add(self, finished: FinishedConversation) -> None:
        """Append a conversation; it is on disk when this returns."""
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(_line(finished))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._offsets[bytes.fromhex(finished.key)] = offset

    def find(self, key: str) -> FinishedConversation | None:
        """Return the latest line, or None; CorruptError if it was damaged meanwhile."""
        offset = self._offsets.get(bytes.fromhex(key))
        if offset is None:
            return None
        self._file.seek(offset)
        found = _parse(self._file.readline())
        if found is None or found.key != key:
            raise CorruptError(f"{self.path} changed at byte {offset} while it was read; run again")
        return found.without_cut_reasoning().without_other_context(self._context_tokens)

    def _index(self) -> None:
        self._file.seek(0)
        offset = 0
        line = b"\n"
        for line in self._file:
            finished = _parse(line)
            if finished is not None:
                self._offsets[bytes.fromhex(finished.key)] = offset
            elif line != b"\n":
                self.num_damaged += 1
            offset += len(line)
        if not line.endswith(b"\n"):
            self._file.write(b"\n")  # so that the next entry starts a new line


def _line(finished: FinishedConversation) -> bytes:
    text = finished.model_dump_json(exclude_defaults=True).encode()
    return f"{xxhash.xxh3_64_hexdigest(text)} ".encode() + text + b"\n"


def _parse(line: bytes) -> FinishedConversation | None:
    digest, text = line[:_DIGEST_CHARS], line[_DIGEST_CHARS + 1 : -1]
    if not line.endswith(b"\n") or digest != xxhash.xxh3_64_hexdigest(text).encode():
        return None
    try:
        return FinishedConversation.model_validate_json(text)
    except ValidationError:  # written by another version
        return None
