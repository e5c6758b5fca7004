"""Names of snapshots in a store: the current one of each data set split, and those that runs hold.

`snapshots/refs/<name>.json` is sealed and is replaced when the split is published again. A run that
has not ended holds its snapshot with `snapshots/refs/runs/<run>/<snapshot_id>.json`, whose key has
all the information. Garbage collection keeps every snapshot with a name.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from storage.errors import PUBLISH, CorruptError
from storage.objects.object_store import ObjectStore
from storage.objects.sealed_json import seal, unseal
from storage.records import keys
from storage.records.identity import FORMAT_VERSION
from storage.records.presence import Finding

_RUNS = "runs/"


class Refs:
    """The snapshot names of one store."""

    def __init__(self, root: ObjectStore) -> None:
        """Read and write below the root of a store."""
        self._root = root

    def set(self, name: str, snapshot_id: str, *, made_from: str = "") -> None:
        """Let `name` refer to this snapshot; `made_from` is its origin, for the caller."""
        document = {
            "format_version": FORMAT_VERSION,
            "snapshot_id": snapshot_id,
            "made_from": made_from,
        }
        with suppress(CorruptError):
            found = self._document(name) or {}
            if {**found, "format_version": FORMAT_VERSION} == document:
                return  # no write: the store may be read-only
        self._root.publish(keys.ref(name), seal(document))

    def get(self, name: str) -> str | None:
        """Return the id of the snapshot of this name, None if there is none.

        Raises:
            CorruptError: the name is damaged.

        """
        document = self._document(name)
        return None if document is None else document["snapshot_id"]

    def made_from(self, name: str) -> str:
        """Return the recorded origin of a name; empty if there is none."""
        return str((self._document(name) or {}).get("made_from", ""))

    def _document(self, name: str) -> dict[str, Any] | None:
        try:
            data = self._root.read(keys.ref(name))
        except FileNotFoundError:
            return None
        document = unseal(data, what=f"{self._root.where(keys.ref(name))} ({PUBLISH})")
        if not isinstance(document.get("snapshot_id"), str):
            raise CorruptError(f"{self._root.where(keys.ref(name))} names no snapshot; {PUBLISH}")
        return document

    def names(self) -> Mapping[str, str]:
        """Return the snapshot of every split of a data set, by name."""
        found = {name: self.get(name) for name in self._listed() if not name.startswith(_RUNS)}
        return {name: snapshot_id for name, snapshot_id in found.items() if snapshot_id is not None}

    def hold(self, run: str, snapshot_id: str) -> None:
        """Keep a snapshot for a run until it is released."""
        self.set(f"{_RUNS}{run}/{snapshot_id}", snapshot_id)

    def release(self, run: str, snapshot_id: str) -> None:
        """Stop keeping a snapshot for a run."""
        self._root.delete(keys.ref(f"{_RUNS}{run}/{snapshot_id}"))

    def release_all(self, run: str) -> int:
        """Release all snapshots of a run; return how many it held."""
        held = [snapshot_id for name, snapshot_id in self.held() if name == run]
        for snapshot_id in held:
            self.release(run, snapshot_id)
        return len(held)

    def held(self) -> Sequence[tuple[str, str]]:
        """Return (run, snapshot id) of every snapshot that a run holds."""
        parts = (name.split("/") for name in self._listed() if name.startswith(_RUNS))
        return [(part[1], part[2]) for part in parts if len(part) == 3]

    def remove(self, snapshot_id: str) -> None:
        """Remove every name of a snapshot."""
        for name, named in self.names().items():
            if named == snapshot_id:
                self._root.delete(keys.ref(name))
        for run, held in self.held():
            if held == snapshot_id:
                self.release(run, held)

    def findings(self, snapshot_ids: Sequence[str]) -> Iterator[Finding]:
        """Yield findings on names that are damaged or refer to a missing snapshot."""
        for name in self._listed():
            if name.startswith(_RUNS):
                continue
            problem = None
            try:
                named = self.get(name)
                if named is not None and named not in snapshot_ids:
                    problem = f"names snapshot {named}, which does not exist"
            except CorruptError as error:
                problem = str(error)
            if problem is not None:
                yield Finding(
                    shard_id=None, object_key=keys.ref(name), problem=problem, remedy=PUBLISH
                )

    def _listed(self) -> Sequence[str]:
        names = (keys.without(key, keys.JSON_SUFFIX) for key in self._root.sizes(keys.REFS))
        return sorted(name for name in names if name is not None)
