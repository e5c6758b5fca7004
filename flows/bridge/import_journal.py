"""Which rows of dumps the store has: a token file for each shard, written before its commit.

A row counts as imported once the store holds its sample, so that an import that was interrupted
goes on where it stopped. The token files are the source of the data set that training reads.
"""

import fcntl
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from eagle_core.atomic_files import write_text
from eagle_core.data.row_writer import RowWriter
from eagle_core.errors import MismatchError
from eagle_core.samples import TokenizedSample
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from flows.errors import RunBusyError
from storage.store import Store

_LOCK = ".importing"
_SETTINGS = "settings.json"
_SUFFIX = ".arrow"
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
    ]
)


@contextmanager
def sole_import(folder: Path) -> Iterator[None]:
    """Lock a folder while the block imports into it; RunBusyError if another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunBusyError(
                f"another process imports into {folder}: wait for it, or give another --name"
            ) from error
        yield


class ImportJournal:
    """The imported rows of one data set."""

    def __init__(self, folder: Path, store: Store, settings: Mapping[str, object]) -> None:
        """Read what was imported before; files of shards that were never committed are removed.

        `settings` are those that tokens and masks depend on.

        Raises:
            MismatchError: rows were imported before with other settings.

        """
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _require_same(folder, settings)
        self.locations: set[str] = set()
        self.sample_ids: set[str] = set()
        self._files: list[Path] = []
        commits = store.commits()
        self._held_before = commits.held
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            held = commits.held(TokenFile(path).sample_ids)
            if not held:
                path.unlink()
                continue
            self._files.append(path)
            self._count(sample for sample in TokenFile(path) if sample.sample_id in held)
        self._next = int(self._files[-1].stem) + 1 if self._files else 0

    def held_before(self, sample_ids: Collection[str]) -> set[str]:
        """Return which samples the store held before this import."""
        return self._held_before(sample_ids)

    def write(self, samples: Sequence[TokenizedSample]) -> None:
        """Record the rows of a shard that is about to be committed."""
        path = self._folder / f"{self._next:08d}{_SUFFIX}"
        self._next += 1
        write_token_file(path, samples)
        self._files.append(path)
        self._count(iter(samples))

    def write_rows(self, path: Path) -> int:
        """Write all imported rows as a file that a data set is made of; return their number."""
        count = 0
        with RowWriter(path, _SCHEMA) as rows:
            for sample in self._samples():
                rows.add(
                    {
                        "id": sample.location,
                        "input_ids": sample.input_ids.tolist(),
                        "loss_mask": sample.loss_mask.astype("i1").tolist(),
                    }
                )
                count += 1
        return count

    def _samples(self) -> Iterator[TokenizedSample]:
        missing = set(self.sample_ids)
        for path in self._files:
            for sample in TokenFile(path):
                if sample.sample_id in missing:  # two files have it if a kill came between
                    missing.remove(sample.sample_id)
                    yield sample

    def _count(self, samples: Iterator[TokenizedSample]) -> None:
        for sample in samples:
            self.locations.add(sample.location)
            self.sample_ids.add(sample.sample_id)


def _require_same(folder: Path, settings: Mapping[str, object]) -> None:
    path = folder / _SETTINGS
    if not any(folder.glob(f"*{_SUFFIX}")):
        write_text(path, json.dumps(settings))
        return
    before = json.loads(path.read_bytes()) if path.exists() else {}
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        listed = "; ".join(f"{one} was {before.get(one)}, is {settings[one]}" for one in changed)
        raise MismatchError(
            f"rows were imported into {folder.parent} with other settings ({listed}): restore "
            "them, or give another --name"
        )
