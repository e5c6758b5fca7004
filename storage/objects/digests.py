"""Digests of objects: the number of bytes and their xxh3_128."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import xxhash

from storage.objects.sealed_json import digest_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectDigest:
    """The size and digest of one object."""

    num_bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, data: bytes | memoryview) -> Self:
        """Return the digest of these bytes."""
        return cls(num_bytes=len(data), xxh3_128=digest_bytes(data))

    @classmethod
    def of_pieces(cls, pieces: Iterable[bytes | memoryview]) -> "ObjectDigest":
        """Return the digest of bytes that arrive piece by piece."""
        digest = RunningDigest()
        for piece in pieces:
            digest.update(piece)
        return digest.value()

    def __str__(self) -> str:
        """Return a form for error messages."""
        return f"{self.num_bytes} bytes with xxh3_128 {self.xxh3_128}"


class RunningDigest:
    """The digest of an object that arrives piece by piece."""

    def __init__(self) -> None:
        """Start with no bytes."""
        self._digest = xxhash.xxh3_128()
        self._num_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._digest.update(data)
        self._num_bytes += len(data)

    def value(self) -> ObjectDigest:
        """Return the digest of all bytes so far."""
        return ObjectDigest(num_bytes=self._num_bytes, xxh3_128=self._digest.hexdigest())
