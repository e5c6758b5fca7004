"""Excluded samples: the target computes states for them that cannot be stored.

`excluded/<sample_id>.json` records the reason, and the file and record of the conversation. The
samples are not planned again and are in no snapshot. Delete the note to try the sample again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from storage.errors import CorruptError
from storage.objects.object_store import ObjectStore
from storage.objects.sealed_json import seal, unseal
from storage.records import keys
from storage.records.identity import FORMAT_VERSION
from storage.records.presence import Finding
from storage.records.sample_rows import is_id

RETRY_SAMPLE = "delete the note, so that hidden-states tries the sample again: eyas repair"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """An excluded sample."""

    sample_id: str
    reason: str
    location: str = ""
    """File and record of the conversation; empty if unknown."""

    def __str__(self) -> str:
        """Return one line for a report or an error."""
        where = f" ({self.location})" if self.location else ""
        return f"sample {self.sample_id}{where}: {self.reason}"


class Exclusions:
    """The notes of one store."""

    def __init__(self, root: ObjectStore) -> None:
        """Read and write below the root of a store."""
        self._root = root

    def add(self, exclusion: Exclusion) -> None:
        """Exclude a sample from now on."""
        document = {"format_version": FORMAT_VERSION, **asdict(exclusion)}
        self._root.publish(keys.exclusion(exclusion.sample_id), seal(document))

    def sample_ids(self) -> frozenset[str]:
        """Return the ids of the excluded samples; reads no note."""
        names = (keys.without(key, keys.JSON_SUFFIX) for key in self._root.sizes(keys.EXCLUSIONS))
        return frozenset(name for name in names if name is not None and is_id(name))

    def read(self) -> Sequence[Exclusion]:
        """Return all notes that are not damaged, sorted by sample."""
        return [note for note in self._notes().values() if isinstance(note, Exclusion)]

    def findings(self) -> Iterator[Finding]:
        """Yield the notes that are damaged: their samples are excluded for an unknown reason."""
        for sample_id, note in self._notes().items():
            if isinstance(note, CorruptError):
                yield Finding(
                    shard_id=None,
                    object_key=keys.exclusion(sample_id),
                    problem=str(note),
                    remedy=RETRY_SAMPLE,
                )

    def _notes(self) -> Mapping[str, Exclusion | CorruptError]:
        by_key = {keys.exclusion(sample_id): sample_id for sample_id in sorted(self.sample_ids())}
        read = self._root.read_many(list(by_key), absent_ok=True)  # one may be deleted meanwhile
        return {by_key[key]: self._note(by_key[key], data) for key, data in read.items()}

    def _note(self, sample_id: str, data: bytes) -> Exclusion | CorruptError:
        where = self._root.where(keys.exclusion(sample_id))
        try:
            document = unseal(data, what=where)
        except CorruptError as error:
            return error
        if document.get("sample_id") != sample_id:
            return CorruptError(f"{where} is about another sample")
        return Exclusion(
            sample_id=sample_id,
            reason=str(document.get("reason", "")),
            location=str(document.get("location", "")),
        )
