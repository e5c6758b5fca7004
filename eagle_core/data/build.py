"""Build a data set once: read, normalise, deduplicate, split, and account for every record.

Invariant: train + held out + dropped = records read, and nothing is visible before everything is on
disk. Files are written to a temporary directory, synced and moved, the manifest last. A reader
checks size and digest of every file that it opens.
"""

from collections.abc import Iterator
from pathlib import Path

from eagle_core.data.cleaning import Cleaning, Progress
from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.data.conversation import Conversation
from eagle_core.data.conversation_table import from_row
from eagle_core.data.ledger import Reason
from eagle_core.data.manifest import DatasetManifest, FileDigest, SourceCounts, load_manifest
from eagle_core.data.sources import source_identity
from eagle_core.data.split_writer import SplitWriter, read_rows
from eagle_core.data.writer import (
    Split,
    building,
    digest,
    digests,
    keep_ledger,
    open_writers,
    publish,
)
from eagle_core.errors import ConfigError, CorruptError, MismatchError

RULES_VERSION = 5
"""Increment it when cleaning or columns change: older data sets are then rebuilt."""
_OLDEST_ANSWERS = 4
"""A target's answers are expensive: data sets of them are read from these rules on."""


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
    source = source_identity(config)
    identity = _identity(config, questions_suffice=questions_suffice)
    finished = _finished(out_dir, identity, source)
    if finished is not None:
        progress(1.0, f"{finished.num_conversations} conversations already built")
        return finished
    with building(out_dir) as directory:
        with open_writers(directory) as writers:
            cleaning = Cleaning(config, writers.ledger, questions_suffice=questions_suffice)
            written = SplitWriter(config, writers)
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
            by_source=_by_source(config, cleaning, written),
            files=digests(directory),
        )
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
    if not _is_readable(manifest):
        raise MismatchError(
            f"{directory} was built with rules {manifest.rules_version}, but this version has "
            f"rules {RULES_VERSION}; run the flow that built it (`dataset` or `regenerate`) again"
        )
    _check_file(directory / name, manifest.files[name])
    yield from map(from_row, read_rows(directory / name))


def _is_readable(manifest: DatasetManifest) -> bool:
    oldest = _OLDEST_ANSWERS if manifest.is_regenerated else RULES_VERSION
    return oldest <= manifest.rules_version <= RULES_VERSION


def _by_source(
    config: DatasetConfig, cleaning: Cleaning, written: SplitWriter
) -> dict[str, SourceCounts]:
    return {
        part.name: SourceCounts(
            num_records=cleaning.num_records_by_source[part.name],
            num_train=written.kept_by_source[part.name, "train"],
            num_held_out=written.kept_by_source[part.name, "held_out"],
        )
        for part in config.sources
    }


def _nothing_usable(
    config: DatasetConfig, cleaning: Cleaning, written: SplitWriter, ledger: Path
) -> str:
    dropped = dict(sorted(cleaning.dropped.items()))
    advice = "correct `source`"
    if Reason.NO_MESSAGES in dropped:
        advice += (
            ", or name the columns with `question` and `answer`, or `rendered_text` for text that "
            "is rendered already"
        )
    if Reason.NO_ASSISTANT_TURN in dropped:
        advice += ", or let the target answer its questions (`eyas run regenerate`)"
    return (
        f"data set {config.name}: {config.origin} has no usable training conversation "
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
