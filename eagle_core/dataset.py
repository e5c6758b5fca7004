"""Builds a data set once: read, normalise, deduplicate, split, and account for every record.

Invariant: train + held out + dropped = records read, and nothing is visible before all of it is on
disk. Files are written to a temporary directory, synced, moved, and the manifest moves last; a
reader checks size and digest of what it opens.
"""

import hashlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from eagle_core.conversation_table import CONVERSATION_SCHEMA, from_row, to_row
from eagle_core.conversations import (
    Conversation,
    content_key,
    is_held_out,
    normalise,
    piece_key,
)
from eagle_core.dataset_config import DatasetConfig
from eagle_core.dataset_manifest import MANIFEST_NAME, DatasetManifest, FileDigest, load_manifest
from eagle_core.errors import ConfigError, CorruptError, MismatchError
from eagle_core.files import file_digest, sync
from eagle_core.ledger import Reason, RejectedRecord
from eagle_core.ledger_writer import LedgerWriter
from eagle_core.row_writer import RowWriter
from eagle_core.source_record import DamagedRecord, SourceRecord
from eagle_core.sources import find_source, identify, read_records

Split = Literal["train", "held_out"]
Progress = Callable[[float, str], None]
"""Called now and then with the share of the source that has been read (0 to 1) and a sentence."""

RULES_VERSION = 3
"""Raise it when cleaning or columns change: data sets made before are then built again."""
LEDGER_NAME = "ledger.parquet"
_SPLITS: tuple[Split, ...] = ("train", "held_out")
_BUILDING = ".building-"
_ABANDONED_SECONDS = 24 * 3600
_RECORDS_PER_REPORT = 500
_ROWS_PER_BATCH = 256


def build_dataset(
    config: DatasetConfig, *, out_dir: Path, progress: Progress = lambda _share, _what: None
) -> DatasetManifest:
    """Write `train.parquet`, `held_out.parquet`, `ledger.parquet` and `manifest.json`.

    Returns the manifest of what is there already if it was made from the same source by the same
    options and rules. Raises `ConfigError` or `CorruptError` for a source that is missing or
    damaged, and `MismatchError` if the source changed while it was read; nothing is left behind.
    """
    source = identify(find_source(config))
    finished = _finished(out_dir, config, source)
    if finished is not None:
        progress(1.0, f"{finished.num_conversations} conversations are there already")
        return finished
    out_dir.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out_dir)
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=out_dir) as directory:
        manifest = _write(config, source, Path(directory), progress)
        if identify(find_source(config)) != source:
            raise MismatchError(
                f"data set {config.name}: {config.source} changed while it was read; run again"
            )
        _publish(manifest, Path(directory), out_dir)
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
            f"{RULES_VERSION}; run the `dataset` flow to build it again"
        )
    _check_file(directory / name, manifest.files[name])
    with pq.ParquetFile(directory / name) as table:
        for batch in table.iter_batches(_ROWS_PER_BATCH):
            yield from map(from_row, batch.to_pylist())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Writers:
    """The files of a data set while they are written."""

    splits: Mapping[Split, RowWriter]
    ledger: LedgerWriter


class _Builder:
    """Takes records one by one and keeps the accounts."""

    def __init__(self, config: DatasetConfig, writers: _Writers) -> None:
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
                record.value, location=record.location, columns=self._config.columns
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
    with _open_writers(directory) as writers:
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
    names = [*(f"{split}.parquet" for split in _SPLITS), LEDGER_NAME]
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
        files={name: _digest(directory / name) for name in names},
    )


@contextmanager
def _open_writers(directory: Path) -> Iterator[_Writers]:
    with ExitStack() as stack:
        yield _Writers(
            splits={
                split: stack.enter_context(
                    RowWriter(directory / f"{split}.parquet", CONVERSATION_SCHEMA)
                )
                for split in _SPLITS
            },
            ledger=stack.enter_context(LedgerWriter(directory / LEDGER_NAME)),
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
    for name, digest in manifest.files.items():
        path = out_dir / name
        if not path.is_file() or path.stat().st_size != digest.size_bytes:
            return None
    return manifest


def _remove_abandoned(out_dir: Path) -> None:
    """Remove what builds left that were killed long ago; a younger one may still be running."""
    for path in out_dir.glob(f"{_BUILDING}*"):
        if path.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
            shutil.rmtree(path)


def _publish(manifest: DatasetManifest, directory: Path, out_dir: Path) -> None:
    (directory / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    for name in (*manifest.files, MANIFEST_NAME):
        sync(directory / name)
    (out_dir / MANIFEST_NAME).unlink(missing_ok=True)  # from here on no data set is there
    sync(out_dir)
    for name in manifest.files:
        (directory / name).replace(out_dir / name)
    sync(out_dir)
    (directory / MANIFEST_NAME).replace(out_dir / MANIFEST_NAME)
    sync(out_dir)


def _digest(path: Path) -> FileDigest:
    return FileDigest(size_bytes=path.stat().st_size, xxh3_128=file_digest(path))


def _check_file(path: Path, expected: FileDigest) -> None:
    if not path.is_file():
        raise CorruptError(f"{path} is missing; run the `dataset` flow to build it again")
    found = _digest(path)
    if found != expected:
        raise CorruptError(
            f"{path} has {found.size_bytes} bytes and digest {found.xxh3_128}, the manifest says "
            f"{expected.size_bytes} and {expected.xxh3_128}; delete the manifest and run the "
            "`dataset` flow"
        )
