"""Write every conversation of a data set into its split."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation
from eagle_core.data.conversation_table import CONVERSATION_SCHEMA, to_row
from eagle_core.data.row_writer import RowWriter
from eagle_core.data.source_record import source_of
from eagle_core.data.splits import ChatGroups, is_held_out, question_key
from eagle_core.data.writer import DatasetWriters, Split

_UNSPLIT = "unsplit.parquet"
_ROWS_PER_BATCH = 256
_BYTES_PER_BATCH = 8 << 20
"""As encoded in the file; in Python, token ids take about 16 times as much."""


class SplitWriter:
    """Decides on the split of every conversation, and counts."""

    def __init__(self, config: DatasetConfig, writers: DatasetWriters) -> None:
        self._config = config
        self._writers = writers
        self._sources_of_pieces = {
            part.name for part in config.sources if part.keep_pieces_together
        }
        self._fingerprint = hashlib.sha256()
        self.kept: Counter[Split] = Counter()
        self.kept_by_source: Counter[tuple[str, Split]] = Counter()
        """Empty unless the data set has several sources."""

    @property
    def fingerprint(self) -> str:
        """sha256 over splits and content keys in order."""
        return self._fingerprint.hexdigest()

    def write(self, conversations: Iterator[tuple[Conversation, str]], directory: Path) -> None:
        """Write all conversations; `directory` is for a temporary file."""
        if any(part.keep_pieces_together for part in self._config.parts):
            self._write_groups(conversations, directory / _UNSPLIT)
            return
        for conversation, key in conversations:
            self._put(to_row(conversation, key), question_key(conversation))

    def _write_groups(self, conversations: Iterator[tuple[Conversation, str]], path: Path) -> None:
        """Write all conversations to `path` first: the last one can join two groups."""
        groups = ChatGroups()
        members: list[bytes] = []
        with RowWriter(path, CONVERSATION_SCHEMA) as rows:
            for conversation, key in conversations:
                members.append(bytes.fromhex(self._member(conversation, groups)))
                rows.add(to_row(conversation, key))
        for member, row in zip(members, read_rows(path), strict=True):
            self._put(row, groups.key(member.hex()))

    def _member(self, conversation: Conversation, groups: ChatGroups) -> str:
        """Return a key of the conversation's group; that of its question without chats."""
        source = self._source_of(conversation.location)
        if source and source not in self._sources_of_pieces:
            return question_key(conversation)
        return groups.add(conversation, source=source)

    def _put(self, row: dict[str, Any], split_key: str) -> None:
        is_test = is_held_out(split_key, self._config.held_out_fraction)
        split: Split = "held_out" if is_test else "train"
        self.kept[split] += 1
        if self._config.sources:
            self.kept_by_source[self._source_of(row["location"]), split] += 1
        self._fingerprint.update(f"{split} {row['content_key']}\n".encode())
        self._writers.splits[split].add(row)

    def _source_of(self, location: str) -> str:
        """Return the name of one of several sources; empty for a single one."""
        return source_of(location) if self._config.sources else ""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table of conversations; few long ones are in memory at a time."""
    with pq.ParquetFile(path) as table:
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            # Of one group: a batch of several would join groups that are full of bytes.
            for batch in table.iter_batches(_rows_per_batch(group), row_groups=[number]):
                yield from batch.to_pylist()


def _rows_per_batch(group: pq.RowGroupMetaData) -> int:
    """Return how many rows to read at once; earlier versions wrote groups of any size."""
    fitting: int = group.num_rows * _BYTES_PER_BATCH // max(group.total_byte_size, 1)
    return max(1, min(_ROWS_PER_BATCH, fitting))
