"""Builds a data set once: read, normalise, deduplicate, split, and account for every record.

Invariant: train + held out + dropped = records read, and nothing is visible before all of it is on
disk. Files are written to a temporary directory, synced, moved, and the manifest moves last; a
reader checks size and digest of what it opens.
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
"""Called now and then with the share of the source that has been read (0 to 1) and a sentence."""

RULES_VERSION = 4
"""Raise it when cleaning or columns change: data sets made before are then built again."""
_RECORDS_PER_REPORT = 500
_ROWS_PER_BATCH = 256


def build_dataset(
    config: DatasetConfig, *, out_dir: Path, progress: Progress = lambda _share, _what: None
) -> DatasetManifest:
    """Write `train.parquet`, `held_out.parquet`, `ledger.parquet` and `manifest.json`.

    Returns the manifest of what is there already if it was made from the same source by the same
    options and rules. Raises `ConfigError` or `CorruptError` for a source that is missing or
    damaged, and `MismatchError` if the source changed while it was read; nothing is left behind.
    Answers of a target are neither made nor replaced here: those there are returned.
    """
    if config.source == REGENERATED:
        return _regenerated(out_dir, config)
    _refuse_to_replace_answers(out_dir, config)
    source = identify(find_source(config))
    finished = _finished(out_dir, config, source)
    if finished is not None:
        progress(1.0, f"{finished.num_conversations} conversations are there already")
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
    """Yield the conversations of one split in order, a row group in memory at a time.

    Raises `ConfigError` without a finished data set and `CorruptError` if the file is not, byte for
    byte, what the manifest says.
    """
    name = f"{split}.parquet"
    manifest = load_manifest(directory)
    if manifest.rules_version != RULES_VERSION:
        raise MismatchError(
            f"{directory} was built by rules {manifest.rules_version}, this version has "
            f"{RULES_VERSION}; run the flow that made it (`dataset` or `regenerate`) again"
        )
    _check_file(directory / name, manifest.files[name])
    with pq.ParquetFile(directory / name) as table:
        for batch in table.iter_batches(_ROWS_PER_BATCH):
            yield from map(from_row, batch.to_pylist())


class _Builder:
    """Takes records one by one and keeps the accounts."""

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
        """Keep the record or enter why not."""
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
            duplicate = RejectedRecord(Reason.DUPLICATE, record.location, f"of content {key}")
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
    """Return the manifest of a finished build of the same thing whose files have their sizes."""
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
            "run `eyas run regenerate RECIPE` with the recipe that names its questions, or correct "
            "dataset.name"
        ) from error
    if not manifest.is_regenerated:
        raise ConfigError(
            f"data set {config.name} in {out_dir} was not made by the flow `regenerate`; name its "
            "own source instead of `source: regenerated`"
        )
    return manifest


def _refuse_to_replace_answers(out_dir: Path, config: DatasetConfig) -> None:
    try:
        manifest = load_manifest(out_dir)
    except (ConfigError, CorruptError):
        return
    if manifest.is_regenerated:
        raise ConfigError(
            f"data set {config.name} in {out_dir} holds answers of a target; to use them set "
            f"dataset.source={REGENERATED}, for data from {config.source} take another name"
        )


def _check_file(path: Path, expected: FileDigest) -> None:
    if not path.is_file():
        raise CorruptError(f"{path} is missing; run the `dataset` flow to build it again")
    found = digest(path)
    if found != expected:
        raise CorruptError(
            f"{path} has {found.size_bytes} bytes and digest {found.xxh3_128}, the manifest says "
            f"{expected.size_bytes} and {expected.xxh3_128}; delete the manifest and run the "
            "`dataset` flow"
        )
