"""Turn the records of a data set's sources into conversations, each once.

Every record that is not kept is entered in the ledger.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation, content_key
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.data.normalise import Normalised, normalise
from eagle_core.data.source_record import DamagedRecord, SourceRecord, in_source
from eagle_core.data.sources import read_records
from eagle_core.data.splits import is_taken

Progress = Callable[[float, str], None]
"""Called periodically with the fraction of the source read (0 to 1) and a message."""
_RECORDS_PER_REPORT = 500


class Cleaning:
    """Reads all sources of one data set."""

    def __init__(
        self, config: DatasetConfig, ledger: LedgerWriter, *, questions_suffice: bool
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._questions_suffice = questions_suffice
        self._seen: set[bytes] = set()
        self.num_records_by_source: Counter[str] = Counter()

    @property
    def num_records(self) -> int:
        """Records read so far, damaged ones included."""
        return len(self._seen) + self._ledger.dropped.total()

    @property
    def dropped(self) -> Counter[str]:
        """Dropped records, by reason."""
        return self._ledger.dropped

    def conversations(self, progress: Progress) -> Iterator[tuple[Conversation, str]]:
        """Yield the conversations that are kept, with their content keys."""
        parts = self._config.parts
        for number, part in enumerate(parts):
            yield from self._of_source(part, _share_of(progress, number, len(parts)))

    def _of_source(
        self, part: DatasetConfig, progress: Progress
    ) -> Iterator[tuple[Conversation, str]]:
        """Yield the conversations of one source, up to its `max_conversations`.

        What a source gives does not depend on the others: a conversation that another gave counts.
        """
        given: set[bytes] = set()
        for index, record in enumerate(read_records(part)):
            self.num_records_by_source[part.name] += 1
            if self._config.sources:
                named = in_source(part.name, record.location)
                record = replace(record, location=named)  # noqa: PLW2901
            found = self._selected(record, part)
            if found is not None:
                conversation, key = found
                if part.max_conversations:
                    given.add(bytes.fromhex(key))
                if self._is_first(conversation, key):
                    yield conversation, key
            if index % _RECORDS_PER_REPORT == 0:
                progress(record.fraction_read, f"{len(self._seen)} conversations kept")
            if part.max_conversations == len(given):
                break

    def _selected(
        self, record: SourceRecord | DamagedRecord, part: DatasetConfig
    ) -> tuple[Conversation, str] | None:
        """Return the conversation of a record that its source gives, with its content key."""
        try:
            normalised = self._normalised(record, part)
        except RejectedRecord as rejected:
            self._ledger.drop(rejected)
            return None
        conversation = normalised.conversation
        key = content_key(conversation)
        if not is_taken(key, part.weight):
            self._drop(Reason.NOT_SELECTED, conversation, key)
            return None
        if bytes.fromhex(key) not in self._seen:
            self._enter(normalised)
        return conversation, key

    def _is_first(self, conversation: Conversation, key: str) -> bool:
        if bytes.fromhex(key) in self._seen:
            self._drop(Reason.DUPLICATE, conversation, key)
            return False
        self._seen.add(bytes.fromhex(key))
        return True

    def _drop(self, reason: Reason, conversation: Conversation, key: str) -> None:
        dropped = RejectedRecord(reason, conversation.location, f"content key {key}")
        self._ledger.drop(dropped, conversation_id=conversation.conversation_id)

    def _enter(self, normalised: Normalised) -> None:
        """Enter what was changed in a conversation that is kept, and what was not read."""
        conversation = normalised.conversation
        self._ledger.leave_unread(normalised.unread, location=conversation.location)
        for change in normalised.changes:
            self._ledger.change(
                change,
                location=conversation.location,
                conversation_id=conversation.conversation_id,
            )

    def _normalised(self, record: SourceRecord | DamagedRecord, part: DatasetConfig) -> Normalised:
        if isinstance(record, DamagedRecord):
            raise RejectedRecord(record.reason, record.location, record.detail)
        return normalise(
            record.value,
            location=record.location,
            columns=part.columns,
            rendered_text=part.rendered_text,
            roles=part.roles,
            join_turns=part.join_turns,
            questions_suffice=self._questions_suffice,
        )


def _share_of(progress: Progress, number: int, total: int) -> Progress:
    """Return what reports the progress of one of several sources."""
    return lambda fraction, message: progress((number + fraction) / total, message)
