"""A directory whose every operation can be watched, ordered or cut off."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from storage.directory import Directory


@dataclass(frozen=True, slots=True)
class SteppedDirectory(Directory):
    """A directory that runs each operation inside the context that `step` gives for its name."""

    step: Callable[[str], AbstractContextManager[object]]

    @classmethod
    def over(
        cls, directory: Directory, step: Callable[[str], AbstractContextManager[object]]
    ) -> "SteppedDirectory":
        """Return the same place, stepped."""
        return cls(directory.file_system, directory.root, step)

    def read(self, key: str) -> bytes:
        with self.step(f"read {key}"):
            return Directory.read(self, key)

    def tags(self, prefix: str) -> Mapping[str, str | None]:
        with self.step(f"tags {prefix}"):
            return Directory.tags(self, prefix)

    def sizes(self, prefix: str) -> Mapping[str, int]:
        with self.step(f"sizes {prefix}"):
            return Directory.sizes(self, prefix)

    def write(self, key: str, data: bytes | memoryview) -> str | None:
        with self.step(f"write {key}"):
            return Directory.write(self, key, data)

    def delete(self, key: str) -> None:
        with self.step(f"delete {key}"):
            Directory.delete(self, key)
