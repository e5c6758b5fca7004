"""The data set of answered conversations while it is written, and its ledger.

Invariant: every conversation of the source is kept or in the ledger.
"""

import hashlib
from collections import Counter
from collections.abc import Collection

from eagle_core.data.conversation import content_key
from eagle_core.data.conversation_table import to_row
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.data.source_record import source_of
from eagle_core.data.writer import DatasetWriters, Split
from eagle_core.regeneration.journal import FinishedConversation
from eagle_core.regeneration.source_rows import SourceRow
from eagle_core.regeneration.turns import with_answers


class AnsweredDataset:
    """Writes answered conversations and enters the others in the ledger."""

    def __init__(
        self, source: str, writers: DatasetWriters, *, sources: Collection[str] = ()
    ) -> None:
        """Write answers to the data set `source`, which may have several `sources` itself."""
        self._source = source
        self._sources = sources
        self._writers = writers
        self._seen: set[bytes] = set()
        self.fingerprint = hashlib.sha256()
        self.kept: Counter[Split] = Counter()
        self.kept_by_source: Counter[tuple[str, Split]] = Counter()
        """Empty unless the questions have several sources."""
        self.examples: dict[str, str] = {}
        """The first detail of every reason for which a conversation was dropped."""

    @property
    def num_records(self) -> int:
        """Conversations so far: kept + dropped."""
        return self.kept.total() + self._writers.ledger.dropped.total()

    def add(self, entry: SourceRow, finished: FinishedConversation | None) -> None:
        """Keep the answered conversation in its split, or enter the reason in the ledger."""
        if finished is None:
            self._drop(entry, Reason.SERVER_ERROR, "not asked")
            return
        answered = with_answers(entry.conversation, finished.answers)
        if answered is None:
            self._drop(entry, finished.failure or Reason.NO_ASSISTANT_TURN, finished.detail)
            return
        key = content_key(answered)
        if bytes.fromhex(key) in self._seen:
            self._drop(entry, Reason.DUPLICATE, f"content key {key}")
            return
        self._seen.add(bytes.fromhex(key))
        self.kept[entry.split] += 1
        if self._sources:
            self.kept_by_source[source_of(answered.location), entry.split] += 1
        self.fingerprint.update(f"{entry.split} {key}\n".encode())
        self._writers.splits[entry.split].add(to_row(answered, key))
        if len(answered.messages) < len(entry.conversation.messages) or finished.failure:
            self._shortened(entry, finished)

    def _shortened(self, entry: SourceRow, finished: FinishedConversation) -> None:
        failed = finished.failure
        change = Change.ENDED_BEFORE_FAILED_ANSWER if failed else Change.ENDED_AT_TOOL_CALL
        if finished.is_asked_again:
            change = Change.ENDED_BEFORE_UNANSWERED
        self._writers.ledger.change(
            change,
            location=entry.location(self._source),
            conversation_id=entry.conversation.conversation_id,
            detail=f"{failed}, {finished.detail}" if failed else "",
        )

    def _drop(self, entry: SourceRow, reason: Reason, detail: str) -> None:
        self.examples.setdefault(reason, detail)
        self._writers.ledger.drop(
            RejectedRecord(reason, entry.location(self._source), detail),
            conversation_id=entry.conversation.conversation_id,
        )
