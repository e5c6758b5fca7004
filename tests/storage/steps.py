"""A directory whose every operation can be watched, ordered or cut off."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.objects.listing import Entry
from storage.objects.object_store import ObjectStore


@dataclass(frozen=True, slots=True)
class SteppedObjectStore(ObjectStore):
    """A directory that runs each operation inside the context that `step` gives for its name."""

    step: Callable[[str], AbstractContextManager[object]]

    @classmethod
    def over(
        cls, directory: ObjectStore, step: Callable[[str], AbstractContextManager[object]]
    ) -> "SteppedObjectStore":
        """Return the same place, stepped."""
        return cls(directory.file_system, directory.root, step)

    def read(self, key: str) -> bytes:
        with self.step(f"read {key}"):
            return ObjectStore.read(self, key)

    def read_large(self, key: str, **options: Any) -> bytes | memoryview:
        if not self.is_local:
            return ObjectStore.read_large(self, key, **options)
        with self.step(f"read {key}"):
            return ObjectStore.read_large(self, key, **options)

    def exists(self, key: str) -> bool:
        with self.step(f"exists {key}"):
            return ObjectStore.exists(self, key)

    def entries(self, prefix: str) -> Mapping[str, Entry]:
        with self.step(f"entries {prefix}"):
            return ObjectStore.entries(self, prefix)

    def write(self, key: str, data: bytes | memoryview) -> None:
        with self.step(f"write {key}"):
            ObjectStore.write(self, key, data)

    @contextmanager
    def open(self, key: str) -> Iterator[Callable[[bytes], object]]:
        if not self.is_local:
            with ObjectStore.open(self, key) as write:
                yield write
            return
        with self.step(f"open {key}"):
            pass
        with ObjectStore.open(self, key) as write:
            yield write
        with self.step(f"write {key}"):
            pass

    def _create_on_server(self, key: str, data: bytes) -> bool:
        with self.step(f"create {key}"):
            return ObjectStore._create_on_server(self, key, data)

    @contextmanager
    def _beside(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        with ObjectStore._beside(self, key, data) as names, self.step(f"name {key}"):
            yield names

    def delete(self, key: str) -> None:
        with self.step(f"delete {key}"):
            ObjectStore.delete(self, key)
