"""Write the files of a data set next to the old ones and move them into place, manifest last.

Invariant: nothing is visible before everything is on disk; a manifest implies complete files.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eagle_core.atomic_files import disk_errors, file_digest, partial_folder, sync
from eagle_core.data.conversation_table import CONVERSATION_SCHEMA
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.data.manifest import MANIFEST_NAME, DatasetManifest, FileDigest
from eagle_core.data.row_writer import RowWriter

Split = Literal["train", "held_out"]

SPLITS: tuple[Split, ...] = ("train", "held_out")
LEDGER_NAME = "ledger.parquet"
_FILE_NAMES = (*(f"{split}.parquet" for split in SPLITS), LEDGER_NAME)
FAILED_LEDGER_NAME = "failed-ledger.parquet"
"""The ledger of a build that kept nothing; a data set of an earlier build stays beside it."""
_BUILDING = ".building-"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetWriters:
    """The open files of a data set that is being written."""

    splits: Mapping[Split, RowWriter]
    ledger: LedgerWriter


@contextmanager
def building(out_dir: Path) -> Iterator[Path]:
    """Yield a temporary directory inside `out_dir`; it is removed with its contents."""
    with disk_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        for left in out_dir.glob(f"{_BUILDING}*"):  # left by a killed run of an earlier version
            shutil.rmtree(left, ignore_errors=True)
        with partial_folder(out_dir) as directory:
            yield directory


@contextmanager
def open_writers(directory: Path) -> Iterator[DatasetWriters]:
    """Yield writers of conversations and ledger entries; the files are complete afterwards."""
    with ExitStack() as stack:
        yield DatasetWriters(
            splits={
                split: stack.enter_context(
                    RowWriter(directory / f"{split}.parquet", CONVERSATION_SCHEMA)
                )
                for split in SPLITS
            },
            ledger=stack.enter_context(LedgerWriter(directory / LEDGER_NAME)),
        )


def keep_ledger(directory: Path, out_dir: Path) -> Path:
    """Move the ledger of a build that kept nothing to where it can be read; return its path."""
    return (directory / LEDGER_NAME).replace(out_dir / FAILED_LEDGER_NAME)


def digests(directory: Path) -> dict[str, FileDigest]:
    """Return the manifest entries of the files in `directory`."""
    return {name: digest(directory / name) for name in _FILE_NAMES}


def digest(path: Path) -> FileDigest:
    """Return size and digest of a file."""
    return FileDigest(size_bytes=path.stat().st_size, xxh3_128=file_digest(path))


def publish(manifest: DatasetManifest, directory: Path, out_dir: Path) -> None:
    """Move the files into place, then the manifest; a kill never leaves part of a data set."""
    (directory / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    for name in (*manifest.files, MANIFEST_NAME):
        sync(directory / name)
    (out_dir / MANIFEST_NAME).unlink(missing_ok=True)  # from here on there is no data set
    sync(out_dir)
    for name in manifest.files:
        (directory / name).replace(out_dir / name)
    sync(out_dir)
    (directory / MANIFEST_NAME).replace(out_dir / MANIFEST_NAME)
    (out_dir / FAILED_LEDGER_NAME).unlink(missing_ok=True)
    sync(out_dir)
