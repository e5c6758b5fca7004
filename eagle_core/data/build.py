"""Build a data set once: read, normalise, deduplicate, split, and account for every record.

Invariant: train + held out + dropped = records read, and nothing is visible before everything is on
disk. Files are written to a temporary directory, synced and moved, the manifest last. A reader
checks size and digest of every file that it opens.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.data.conversation import Conversation, content_key
from eagle_core.data.conversation_table import from_row, to_row
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.manifest import DatasetManifest, FileDigest, SourceCounts, load_manifest
from eagle_core.data.normalise import normalise
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.data.sources import read_records, source_identity
from eagle_core.data.splits import is_held_out, is_taken, piece_key
from eagle_core.data.writer import (
    DatasetWriters,
    Split,
    building,
    digest,
    digests,
    open_writers,
    publish,
)
from eagle_core.errors import ConfigError, CorruptError, MismatchError

Progress = Callable[[float, str], None]
"""Called periodically with the fraction of the source read (0 to 1) and a message."""

RULES_VERSION = 4
"""Increment it when cleaning or columns change: older data sets are then rebuilt."""
_RECORDS_PER_REPORT = 500
_ROWS_PER_BATCH = 256


def build_dataset(
    config: DatasetConfig, *, out_dir: Path, progress: Progress = lambda _share, _what: None
) -> DatasetManifest:
    """Write `train.parquet`, `held_out.parquet`, `ledger.parquet` and `manifest.json`.

    Returns the existing manifest if it was built from the same source with the same options and
    rules. Raises `ConfigError` or `CorruptError` for a source that is missing or damaged, and
    `MismatchError` if the source changed while it was read; nothing is left behind. A target's
    answers are neither generated nor replaced here: an existing data set of them is returned.
    """
    if config.source == REGENERATED:
        return _regenerated(out_dir, config)
    _refuse_to_replace_answers(out_dir, config)
    source = source_identity(config)
    finished = _finished(out_dir, config, source)
    if finished is not None:
        progress(1.0, f"{finished.num_conversations} conversations already built")
        return finished
    with building(out_dir) as directory:
        manifest = _write(config, source, directory, progress)
        if source_identity(config) != source:
            raise MismatchError(
                f"data set {config.name}: {config.origin} changed while it was read; run again"
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
    if manifest.rules_version != RULES_VERSION:
        raise MismatchError(
            f"{directory} was built with rules {manifest.rules_version}, but this version has "
            f"rules {RULES_VERSION}; run the flow that built it (`dataset` or `regenerate`) again"
        )
    _check_file(directory / name, manifest.files[name])
    with pq.ParquetFile(directory / name) as table:
        for batch in table.iter_batches(_ROWS_PER_BATCH):
            yield from map(from_row, batch.to_pylist())


class _Builder:
    """Adds records one by one and counts them."""

    def __init__(self, config: DatasetConfig, writers: DatasetWriters) -> None:
        self._names_sources = bool(config.sources)
        self._keeps_pieces = any(part.keep_pieces_together for part in config.parts)
        self._held_out_fraction = config.held_out_fraction
        self._writers = writers
        self._seen: set[bytes] = set()
        self._fingerprint = hashlib.sha256()
        self.kept: Counter[Split] = Counter()

    @property
    def num_records(self) -> int:
        return self.kept.total() + self._writers.ledger.dropped.total()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint.hexdigest()

    def add_source(self, part: DatasetConfig, progress: Progress) -> None:
        """Add the records of one source, up to its `max_conversations`."""
        taken: set[bytes] = set()
        for index, record in enumerate(read_records(part)):
            named = replace(record, location=f"{part.name}: {record.location}")
            key = self._add(named if self._names_sources else record, part, taken)
            if key is not None and part.max_conversations:
                taken.add(key)
            if index % _RECORDS_PER_REPORT == 0:
                progress(record.fraction_read, f"{self.kept.total()} conversations kept")
            if part.max_conversations == len(taken):
                break

    def _add(
        self, record: SourceRecord | DamagedRecord, part: DatasetConfig, taken: set[bytes]
    ) -> bytes | None:
        """Keep the record, or enter the reason in the ledger.

        Returns the content key of a conversation that this source gives. That another source gave
        it too makes no difference to what this one gives.
        """
        ledger = self._writers.ledger
        if isinstance(record, DamagedRecord):
            ledger.drop(RejectedRecord(record.reason, record.location, record.detail))
            return None
        try:
            normalised = normalise(
                record.value,
                location=record.location,
                columns=part.columns,
                rendered_text=part.rendered_text,
            )
        except RejectedRecord as rejected:
            ledger.drop(rejected)
            return None
        conversation = normalised.conversation
        conversation_id = conversation.conversation_id
        key = content_key(conversation)
        reason = self._reason_to_drop(key, part)
        if reason is not None:
            dropped = RejectedRecord(reason, record.location, f"content key {key}")
            ledger.drop(dropped, conversation_id=conversation_id)
        else:
            self._seen.add(bytes.fromhex(key))
            self._keep(conversation, key)
            for change in normalised.changes:
                ledger.change(change, location=record.location, conversation_id=conversation_id)
        is_given = reason is not Reason.NOT_SELECTED and bytes.fromhex(key) not in taken
        return bytes.fromhex(key) if is_given else None

    def _reason_to_drop(self, key: str, part: DatasetConfig) -> Reason | None:
        if not is_taken(key, part.weight):
            return Reason.NOT_SELECTED
        return Reason.DUPLICATE if bytes.fromhex(key) in self._seen else None

    def _keep(self, conversation: Conversation, key: str) -> None:
        split_key = piece_key(conversation) if self._keeps_pieces else key
        is_test = is_held_out(split_key, self._held_out_fraction)
        split: Split = "held_out" if is_test else "train"
        self.kept[split] += 1
        self._fingerprint.update(f"{split} {key}\n".encode())
        self._writers.splits[split].add(to_row(conversation, key))


def _write(
    config: DatasetConfig,
    source: tuple[dict[str, object], ...],
    directory: Path,
    progress: Progress,
) -> DatasetManifest:
    by_source: dict[str, SourceCounts] = {}
    with open_writers(directory) as writers:
        builder = _Builder(config, writers)
        for number, part in enumerate(config.parts):
            read, kept = builder.num_records, builder.kept.copy()
            builder.add_source(part, _share_of(progress, number, len(config.parts)))
            by_source[part.name] = SourceCounts(
                num_records=builder.num_records - read,
                num_train=builder.kept["train"] - kept["train"],
                num_held_out=builder.kept["held_out"] - kept["held_out"],
            )
    dropped = dict(sorted(writers.ledger.dropped.items()))
    if not builder.kept["train"]:
        raise ConfigError(
            f"data set {config.name}: {config.origin} has no usable training conversation "
            f"({builder.num_records} records; dropped: {dropped}; held out: "
            f"{builder.kept['held_out']}); correct `source`"
        )
    progress(1.0, f"{builder.kept.total()} conversations kept")
    return DatasetManifest(
        name=config.name,
        fingerprint=builder.fingerprint,
        rules_version=RULES_VERSION,
        config=config.identity(),
        source=source,
        num_records=builder.num_records,
        num_train=builder.kept["train"],
        num_held_out=builder.kept["held_out"],
        dropped=dropped,
        changed=dict(sorted(writers.ledger.changed.items())),
        by_source=by_source if config.sources else {},
        files=digests(directory),
    )


def _share_of(progress: Progress, number: int, total: int) -> Progress:
    """Return what reports the progress of one of several sources."""
    return lambda fraction, message: progress((number + fraction) / total, message)


def _finished(
    out_dir: Path, config: DatasetConfig, source: tuple[dict[str, object], ...]
) -> DatasetManifest | None:
    """Return the manifest of a finished build of the same inputs if its files have their sizes."""
    try:
        manifest = load_manifest(out_dir)
    except (ConfigError, CorruptError):
        return None
    made_from = (manifest.rules_version, manifest.config, manifest.source)
    if made_from != (RULES_VERSION, config.identity(), source):
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
            f"dataset.source={REGENERATED}; for data from {config.origin}, choose another name"
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
