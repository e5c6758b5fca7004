"""Build a data set once: read, normalise, deduplicate, split, and account for every record.

Invariant: train + held out + dropped = records read, and nothing is visible before everything is on
disk. Files are written to a temporary directory, synced and moved, the manifest last. A reader
checks size and digest of every file that it opens.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.data.conversation import Conversation, content_key
from eagle_core.data.conversation_table import CONVERSATION_SCHEMA, from_row, to_row
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.data.manifest import DatasetManifest, FileDigest, load_manifest
from eagle_core.data.normalise import Normalised, normalise
from eagle_core.data.row_writer import RowWriter
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.data.sources import find_source, identify, read_records
from eagle_core.data.splits import ChatGroups, is_held_out, question_key
from eagle_core.data.writer import (
    DatasetWriters,
    Split,
    building,
    digest,
    digests,
    keep_ledger,
    open_writers,
    publish,
)
from eagle_core.errors import ConfigError, CorruptError, MismatchError

Progress = Callable[[float, str], None]
"""Called periodically with the fraction of the source read (0 to 1) and a message."""

RULES_VERSION = 5
"""Increment it when cleaning or columns change: older data sets are then rebuilt."""
_OLDEST_ANSWERS = 4
"""A target's answers are expensive: data sets of them are read from these rules on."""
_UNSPLIT = "unsplit.parquet"
_RECORDS_PER_REPORT = 500
_ROWS_PER_BATCH = 256


def build_dataset(
    config: DatasetConfig,
    *,
    out_dir: Path,
    questions_suffice: bool = False,
    progress: Progress = lambda _share, _what: None,
) -> DatasetManifest:
    """Write `train.parquet`, `held_out.parquet`, `ledger.parquet` and `manifest.json`.

    With `questions_suffice` conversations may lack answers, for a target that will give its own.
    A data set that was built without is then built anew, and the other way round.

    Returns the existing manifest if it was built from the same source with the same options and
    rules. Raises `ConfigError` or `CorruptError` for a source that is missing or damaged, and
    `MismatchError` if the source changed while it was read. Nothing is left behind, except the
    ledger if no record can be used: its path is in the message. A target's
    answers are neither generated nor replaced here: an existing data set of them is returned.
    """
    if config.source == REGENERATED:
        return _regenerated(out_dir, config)
    _refuse_to_replace_answers(out_dir, config)
    source = identify(find_source(config))
    identity = _identity(config, questions_suffice=questions_suffice)
    finished = _finished(out_dir, identity, source)
    if finished is not None:
        progress(1.0, f"{finished.num_conversations} conversations already built")
        return finished
    with building(out_dir) as directory:
        with open_writers(directory) as writers:
            cleaning = _Cleaning(config, writers.ledger, questions_suffice=questions_suffice)
            written = _Splits(config, writers)
            written.write(cleaning.conversations(progress), directory)
        if not written.kept["train"]:
            ledger = keep_ledger(directory, out_dir)
            raise ConfigError(_nothing_usable(config, cleaning, written, ledger))
        progress(1.0, f"{written.kept.total()} conversations kept")
        manifest = DatasetManifest(
            name=config.name,
            fingerprint=written.fingerprint,
            rules_version=RULES_VERSION,
            config=identity,
            source=source,
            num_records=cleaning.num_records,
            num_train=written.kept["train"],
            num_held_out=written.kept["held_out"],
            dropped=dict(sorted(writers.ledger.dropped.items())),
            changed=dict(sorted(writers.ledger.changed.items())),
            unread=writers.ledger.unread,
            files=digests(directory),
        )
        if identify(find_source(config)) != source:
            raise MismatchError(
                f"data set {config.name}: {config.source} changed while it was read; run again"
            )
        publish(manifest, directory, out_dir)
    return manifest


def load_conversations(directory: Path, split: Split) -> Iterator[Conversation]:
    """Yield the conversations of one split in order, one row group in memory at a time.

    Raises `ConfigError` without a finished data set and `CorruptError` if the file does not match
    its size and digest in the manifest.
    """
    name = f"{split}.parquet"
    manifest = load_manifest(directory)
    if not _is_readable(manifest):
        raise MismatchError(
            f"{directory} was built with rules {manifest.rules_version}, but this version has "
            f"rules {RULES_VERSION}; run the flow that built it (`dataset` or `regenerate`) again"
        )
    _check_file(directory / name, manifest.files[name])
    yield from map(from_row, _rows(directory / name))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(_ROWS_PER_BATCH):
            yield from batch.to_pylist()


def _is_readable(manifest: DatasetManifest) -> bool:
    oldest = _OLDEST_ANSWERS if manifest.is_regenerated else RULES_VERSION
    return oldest <= manifest.rules_version <= RULES_VERSION


class _Cleaning:
    """Turns records into conversations, each once, and enters the others in the ledger."""

    def __init__(
        self, config: DatasetConfig, ledger: LedgerWriter, *, questions_suffice: bool
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._questions_suffice = questions_suffice
        self._seen: set[bytes] = set()

    @property
    def num_records(self) -> int:
        return len(self._seen) + self._ledger.dropped.total()

    @property
    def dropped(self) -> Counter[str]:
        return self._ledger.dropped

    def conversations(self, progress: Progress) -> Iterator[tuple[Conversation, str]]:
        """Yield the conversations that are kept, with their content keys."""
        for index, record in enumerate(read_records(self._config)):
            if (kept := self._clean(record)) is not None:
                yield kept
            if index % _RECORDS_PER_REPORT == 0:
                progress(record.fraction_read, f"{len(self._seen)} conversations kept")
            if len(self._seen) == self._config.max_conversations:
                break

    def _clean(self, record: SourceRecord | DamagedRecord) -> tuple[Conversation, str] | None:
        if isinstance(record, DamagedRecord):
            self._ledger.drop(RejectedRecord(record.reason, record.location, record.detail))
            return None
        try:
            normalised = self._normalised(record)
        except RejectedRecord as rejected:
            self._ledger.drop(rejected)
            return None
        conversation = normalised.conversation
        conversation_id = conversation.conversation_id
        key = content_key(conversation)
        if bytes.fromhex(key) in self._seen:
            duplicate = RejectedRecord(Reason.DUPLICATE, record.location, f"content key {key}")
            self._ledger.drop(duplicate, conversation_id=conversation_id)
            return None
        self._seen.add(bytes.fromhex(key))
        self._ledger.leave_unread(normalised.unread, location=record.location)
        for change in normalised.changes:
            self._ledger.change(change, location=record.location, conversation_id=conversation_id)
        return conversation, key

    def _normalised(self, record: SourceRecord) -> Normalised:
        return normalise(
            record.value,
            location=record.location,
            columns=self._config.columns,
            rendered_text=self._config.rendered_text,
            roles=self._config.roles,
            join_turns=self._config.join_turns,
            questions_suffice=self._questions_suffice,
        )


class _Splits:
    """Writes every conversation into its split."""

    def __init__(self, config: DatasetConfig, writers: DatasetWriters) -> None:
        self._config = config
        self._writers = writers
        self._fingerprint = hashlib.sha256()
        self.kept: Counter[Split] = Counter()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint.hexdigest()

    def write(self, conversations: Iterator[tuple[Conversation, str]], directory: Path) -> None:
        """Write all conversations; `directory` is for a temporary file."""
        if self._config.keep_pieces_together:
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
                members.append(bytes.fromhex(groups.add(conversation)))
                rows.add(to_row(conversation, key))
        for member, row in zip(members, _rows(path), strict=True):
            self._put(row, groups.key(member.hex()))

    def _put(self, row: dict[str, Any], split_key: str) -> None:
        is_test = is_held_out(split_key, self._config.held_out_fraction)
        split: Split = "held_out" if is_test else "train"
        self.kept[split] += 1
        self._fingerprint.update(f"{split} {row['content_key']}\n".encode())
        self._writers.splits[split].add(row)


def _nothing_usable(
    config: DatasetConfig, cleaning: _Cleaning, written: _Splits, ledger: Path
) -> str:
    dropped = dict(sorted(cleaning.dropped.items()))
    advice = "correct `source`"
    if Reason.NO_ASSISTANT_TURN in dropped:
        advice += ", or let the target answer its questions (`eyas run regenerate`)"
    return (
        f"data set {config.name}: {config.source} has no usable training conversation "
        f"({cleaning.num_records} records; dropped: {dropped}; held out: "
        f"{written.kept['held_out']}); {ledger} lists them; {advice}"
    )


def _identity(config: DatasetConfig, *, questions_suffice: bool) -> dict[str, object]:
    """Return what determines the contents; data sets for training are as they always were."""
    return config.identity() | ({"questions_suffice": True} if questions_suffice else {})


def _finished(
    out_dir: Path, identity: dict[str, object], source: tuple[dict[str, object], ...]
) -> DatasetManifest | None:
    """Return the manifest of a finished build of the same inputs if its files have their sizes."""
    try:
        manifest = load_manifest(out_dir)
    except (ConfigError, CorruptError):
        return None
    made_from = (manifest.rules_version, manifest.config, manifest.source)
    if made_from != (RULES_VERSION, identity, source):
        return None
    for name, expected in manifest.files.items():
        path = out_dir / name
        if not path.is_file() or path.stat().st_size != expected.size_bytes:
            return None
    return manifest


def _regenerated(out_dir: Path, config: DatasetConfig) -> DatasetManifest:
    try:
        manifest = load_manifest(out_dir)
    except ConfigError as error:
        raise ConfigError(
            f"data set {config.name}: no target has answered it yet ({out_dir} has no manifest); "
            "run `eyas run regenerate RECIPE` with the recipe that has its questions, or correct "
            "dataset.name"
        ) from error
    if not manifest.is_regenerated:
        raise ConfigError(
            f"data set {config.name} in {out_dir} was not built by the flow `regenerate`; set its "
            "actual source instead of `source: regenerated`"
        )
    return manifest


def _refuse_to_replace_answers(out_dir: Path, config: DatasetConfig) -> None:
    try:
        manifest = load_manifest(out_dir)
    except (ConfigError, CorruptError):
        return
    if manifest.is_regenerated:
        raise ConfigError(
            f"data set {config.name} in {out_dir} contains a target's answers; to use them, set "
            f"dataset.source={REGENERATED}; for data from {config.source}, choose another name"
        )


def _check_file(path: Path, expected: FileDigest) -> None:
    if not path.is_file():
        raise CorruptError(f"{path} is missing; run the `dataset` flow to rebuild it")
    found = digest(path)
    if found != expected:
        raise CorruptError(
            f"{path} has {found.size_bytes} bytes and digest {found.xxh3_128}, but the manifest "
            f"records {expected.size_bytes} and {expected.xxh3_128}; delete the manifest and run "
            "the `dataset` flow"
        )
