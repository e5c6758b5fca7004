"""Samples that a store does without: the target gives them states that cannot be stored.

`excluded/<sample_id>.json` says why, and in which file and record the conversation stands. They are
not planned again and are in no snapshot. Deleting such a note lets the sample be tried once more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from storage.canonical import seal, unseal
from storage.directory import Directory
from storage.errors import CorruptError
from storage.identity import FORMAT_VERSION
from storage.sample_rows import is_id
from storage.verify import Finding

FOLDER = "excluded"
RETRY_SAMPLE = "delete it, the sample is tried again: eyas repair"
_SUFFIX = ".json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """A sample that is left out."""

    sample_id: str
    reason: str
    location: str = ""
    """File and record of the conversation; empty if that is not known."""

    def __str__(self) -> str:
        """Return one line for a report or an error."""
        where = f" ({self.location})" if self.location else ""
        return f"sample {self.sample_id}{where}: {self.reason}"


class Exclusions:
    """The notes of one store."""

    def __init__(self, root: Directory) -> None:
        """Read and write below the root of a store."""
        self._root = root

    def add(self, exclusion: Exclusion) -> None:
        """Leave a sample out from now on."""
        document = {"format_version": FORMAT_VERSION, **asdict(exclusion)}
        self._root.publish(_key(exclusion.sample_id), seal(document))

    def sample_ids(self) -> frozenset[str]:
        """Return the samples that are left out; no note is read."""
        names = (key.removesuffix(_SUFFIX) for key in self._root.sizes(FOLDER))
        return frozenset(name for name in names if is_id(name))

    def read(self) -> Sequence[Exclusion]:
        """Return all notes that read, by sample."""
        found = (self._note(sample_id) for sample_id in sorted(self.sample_ids()))
        return [note for note in found if isinstance(note, Exclusion)]

    def findings(self) -> Iterator[Finding]:
        """Yield the notes that are damaged: the samples are left out, and nobody knows why."""
        for sample_id in sorted(self.sample_ids()):
            note = self._note(sample_id)
            if isinstance(note, CorruptError):
                yield Finding(
                    shard_id=None,
                    object_key=_key(sample_id),
                    problem=str(note),
                    remedy=RETRY_SAMPLE,
                )

    def _note(self, sample_id: str) -> Exclusion | CorruptError | None:
        key = _key(sample_id)
        try:
            document = unseal(self._root.read(key), what=self._root.where(key))
            if document.get("sample_id") != sample_id:
                return CorruptError(f"{self._root.where(key)} is about another sample")
            return Exclusion(
                sample_id=sample_id,
                reason=str(document.get("reason", "")),
                location=str(document.get("location", "")),
            )
        except FileNotFoundError:  # deleted meanwhile
            return None
        except CorruptError as error:
            return error


def _key(sample_id: str) -> str:
    return f"{FOLDER}/{sample_id}{_SUFFIX}"
