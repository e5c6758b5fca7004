"""Which rows of dumps the store has: a token file for each shard, written before its commit.

A row counts as imported once the store holds its sample, so that an import that was interrupted
goes on where it stopped. The token files are the source of the data set that training reads.

Notes, a line of JSON each, say of every imported row what its file was and which states it gave, so
that a file that was replaced is noticed, and of every refused row why, so that it stays refused.
"""

import fcntl
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

import pyarrow as pa
import xxhash

from eagle_core.atomic_files import write_text
from eagle_core.data.row_writer import RowWriter
from eagle_core.errors import MismatchError
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from flows.errors import RunBusyError
from storage.store import Store

_LOCK = ".importing"
_SETTINGS = "settings.json"
_NOTES = "notes.jsonl"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What is remembered of a row."""

    location: str
    stamp: str
    """Of its file; see `stamp_of`."""
    content: str = ""
    """Of what was imported; see `content_of`."""
    refused: str = ""
    """Why it is not the target's; empty if it was imported."""


def stamp_of(file: Path) -> str:
    """Return size and time of change of a file, which differ after nearly every change."""
    try:
        found = file.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def content_of(sample: HiddenStateSample) -> str:
    """Return a digest of a sample's tokens, mask and states."""
    digest = xxhash.xxh3_128(sample.sample_id.encode())
    digest.update(sample.aux_hidden_states.tobytes())
    digest.update(sample.last_hidden_state.tobytes())
    return digest.hexdigest()


class ImportJournal:
    """The imported rows of one data set."""

    def __init__(self, folder: Path, store: Store, settings: Mapping[str, object]) -> None:
        """Read what was imported before; files of shards that were never committed are removed.

        `settings` are those that tokens, masks and what is refused depend on, and the store.

        Raises:
            MismatchError: rows were imported before with other settings, or into another store.

        """
        self._folder = folder
        self._noting = Lock()
        folder.mkdir(parents=True, exist_ok=True)
        _require_same(folder, settings)
        self.notes = _read_notes(folder / _NOTES)
        """What is known of rows, by location; also of such as were not committed."""
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

    @property
    def has_refused(self) -> bool:
        """Whether some row was not the target's, now or earlier."""
        return any(note.refused for note in self.notes.values())

    def note(self, notes: Sequence[Note]) -> None:
        """Remember what is known of rows."""
        lines = [json.dumps(asdict(note)) + "\n" for note in notes]
        with self._noting, (self._folder / _NOTES).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            self.notes |= {note.location: note for note in notes}

    def write(self, samples: Sequence[TokenizedSample], notes: Sequence[Note]) -> None:
        """Record the rows of a shard that is about to be committed."""
        self.note(notes)
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


def _read_notes(path: Path) -> dict[str, Note]:
    """Return notes by location, the last one of each; what a kill cut off is left out."""
    if not path.exists():
        return {}
    whole, _, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        path.write_bytes(whole + b"\n" if whole else b"")
    notes = (Note(**json.loads(line)) for line in whole.splitlines())
    return {note.location: note for note in notes}


def _require_same(folder: Path, settings: Mapping[str, object]) -> None:
    path = folder / _SETTINGS
    before = json.loads(path.read_bytes()) if path.exists() else {}
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if not any(folder.glob(f"*{_SUFFIX}")):
        if changed:
            (folder / _NOTES).unlink(missing_ok=True)
        write_text(path, json.dumps(settings))
    elif changed:
        listed = "; ".join(f"{one} was {before.get(one)}, is {settings[one]}" for one in changed)
        raise MismatchError(
            f"rows were imported into {folder.parent} with other settings ({listed}): restore "
            "them, or give another --name"
        )
