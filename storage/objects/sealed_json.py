"""Canonical JSON and content digests: equal values always give equal bytes and equal ids.

A sealed document contains the digest of its content, so that a flipped digit in a record, a plan or
`store.json` is an error and never another value.
"""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from storage.errors import CorruptError

SEAL = "seal"


def canonical_json(value: object) -> bytes:
    """Serialise to sorted, compact, ASCII JSON; NaN and Infinity are refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def digest_bytes(data: bytes | memoryview) -> str:
    """Return the xxh3_128 of `data`: 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_json(value: object) -> str:
    """Return the digest of a value's canonical JSON."""
    return digest_bytes(canonical_json(value))


def seal(document: Mapping[str, object]) -> bytes:
    """Serialise a document together with the digest of its content."""
    return canonical_json({**document, SEAL: digest_json(dict(document))})


def unseal(data: bytes, *, what: str) -> dict[str, Any]:
    """Parse a sealed document; raise CorruptError naming `what` unless content and seal agree."""
    try:
        document = json.loads(data)
    except ValueError as error:
        raise CorruptError(f"{what} is not JSON ({len(data)} bytes): {error}") from error
    if not isinstance(document, dict) or SEAL not in document:
        raise CorruptError(f"{what} is not a sealed document ({len(data)} bytes)")
    expected = document.pop(SEAL)
    found = digest_json(document)
    if found != expected:
        raise CorruptError(f"{what} has digest {found} but is sealed with {expected}")
    return document
