"""The conversations of the data set whose questions are asked, each with its position.

With several answers per question, a conversation has so many copies, one after the other. The first
is the conversation itself: more answers leave those of before as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from eagle_core.data.build import load_conversations
from eagle_core.data.conversation import Conversation, content_key
from eagle_core.data.writer import SPLITS, Split
from eagle_core.regeneration.journal import AnswerJournal, FinishedConversation
from eagle_core.regeneration.turns import open_turns, up_to_last_answer


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """A conversation of the source and its position."""

    conversation: Conversation
    key: str
    """Content key of the conversation; of a further copy, a digest of that and of its number."""
    split: Split
    row: int
    copy: int = 0

    def location(self, source: str) -> str:
        """Return the position as the ledger names it."""
        further = f", answer {self.copy + 1}" if self.copy else ""
        return f"{source}, {self.split}.parquet, row {self.row}{further}"

    def find(self, journal: AnswerJournal) -> FinishedConversation | None:
        """Return what the journal holds of this conversation, or of it without its last question.

        Data sets of earlier versions lacked a last question without an answer.
        """
        if (found := journal.find(self.key)) or self.copy:
            return found
        shorter = content_key(up_to_last_answer(self.conversation))
        found = None if shorter == self.key else journal.find(shorter)
        return found.model_copy(update={"key": self.key}) if found else None

    def is_settled(self, finished: FinishedConversation) -> bool:
        """Return whether no question of this conversation is left."""
        if finished.failure or (finished.answers and finished.answers[-1].tool_calls):
            return not finished.is_asked_again
        return len(finished.answers) >= len(list(open_turns(self.conversation)))


def source_rows(source: Path, *, num_answers: int = 1) -> Iterator[SourceRow]:
    """Yield the conversations of both splits in order, each `num_answers` times."""
    for split in SPLITS:
        for row, conversation in enumerate(load_conversations(source, split)):
            key = content_key(conversation)
            yield SourceRow(conversation=conversation, key=key, split=split, row=row)
            for copy in range(1, num_answers):
                yield SourceRow(
                    conversation=replace(
                        conversation,
                        conversation_id=f"{conversation.conversation_id}#{copy + 1}",
                    ),
                    key=xxhash.xxh3_128_hexdigest(f"{key} {copy}".encode()),
                    split=split,
                    row=row,
                    copy=copy,
                )
