"""Build a data set once: read, normalise, deduplicate, split, and account for every record.

Invariant: train + held out + dropped = records read, and nothing is visible before everything is on
disk. Files are written to a temporary directory, synced and moved, the manifest last. A reader
checks size and digest of every file that it opens.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.data.conversation import Conversation, content_key
from eagle_core.data.conversation_table import from_row, to_row
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.manifest import DatasetManifest, FileDigest, load_manifest
from eagle_core.data.normalise import normalise
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.data.sources import find_source, identify, read_records
from eagle_core.data.splits import is_held_out, piece_key
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
    source = identify(find_source(config))
    finished = _finished(out_dir, config, source)
    if finished is not None:
        progress(1.0, f"{finished.num_conversations} conversations already built")
        return finished
    with building(out_dir) as directory:
        manifest = _write(config, source, directory, progress)
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
        self._config = config
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

    def add(self, record: SourceRecord | DamagedRecord) -> None:
        """Keep the record, or enter the reason in the ledger."""
        ledger = self._writers.ledger
        if isinstance(record, DamagedRecord):
            ledger.drop(RejectedRecord(record.reason, record.location, record.detail))
            return
        try:
            normalised = normalise(
                record.value,
                location=record.location,
                columns=self._config.columns,
                rendered_text=self._config.rendered_text,
            )
        except RejectedRecord as rejected:
            ledger.drop(rejected)
            return
        conversation = normalised.conversation
        conversation_id = conversation.conversation_id
        key = content_key(conversation)
        if bytes.fromhex(key) in self._seen:
            duplicate = RejectedRecord(Reason.DUPLICATE, record.location, f"content key {key}")
            ledger.drop(duplicate, conversation_id=conversation_id)
            return
        self._seen.add(bytes.fromhex(key))
        self._keep(conversation, key)
        for change in normalised.changes:
            ledger.change(change, location=record.location, conversation_id=conversation_id)

    def _keep(self, conversation: Conversation, key: str) -> None:
        split_key = piece_key(conversation) if self._config.keep_pieces_together else key
        is_test = is_held_out(split_key, self._config.held_out_fraction)
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
    with open_writers(directory) as writers:
        builder = _Builder(config, writers)
        for index, record in enumerate(read_records(config)):
            builder.add(record)
            num_kept = builder.kept.total()
            if index % _RECORDS_PER_REPORT == 0:
                progress(record.fraction_read, f"{num_kept} conversations kept")
            if num_kept == config.max_conversations:
                break
    dropped = dict(sorted(writers.ledger.dropped.items()))
    if not builder.kept["train"]:
        raise ConfigError(
            f"data set {config.name}: {config.source} has no usable training conversation "
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
        files=digests(directory),
    )


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
