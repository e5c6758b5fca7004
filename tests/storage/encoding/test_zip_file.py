"""One file holds the objects of a shard, and whatever is not such a file is refused."""

import io
import zipfile
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.encoding.zip_file import packing, unpacked

keys = st.text("abc/_.0", min_size=1, max_size=20)


def packed(objects: dict[str, list[bytes]]) -> bytes:
    pieces: list[bytes] = []
    with packing(pieces.append) as open_object:
        for key, parts in objects.items():
            with open_object(key) as write:
                for part in parts:
                    write(part)
    return b"".join(pieces)


@given(objects=st.dictionaries(keys, st.lists(st.binary(max_size=50), max_size=4), max_size=6))
def test_what_is_packed_is_unpacked(objects: dict[str, list[bytes]]) -> None:
    data = packed(objects)
    expected = {key: b"".join(parts) for key, parts in objects.items()}
    assert {key: bytes(view) for key, view in unpacked(data).items()} == expected
    assert packed(objects) == data, "equal objects are equal bytes, whenever they are packed"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == expected


@given(data=st.binary(max_size=200), keep=st.integers(0, 400))
def test_what_is_no_such_file_is_refused_or_whole(data: bytes, keep: int) -> None:
    """Readers of ZIP look from the end: bytes before it may be anybody's."""
    whole = packed({"a": [b"some bytes"], "b/c": [b"more"]})
    for wrong in (data, whole[:keep] if keep < len(whole) else b"", whole[:-1] + data[:1]):
        found: set[str] = set()
        with suppress(ValueError):
            found = set(unpacked(wrong))
        assert found in (set(), {"a", "b/c"})


def test_a_compressed_object_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(1000))
    with pytest.raises(ValueError, match="a is compressed"):
        unpacked(file.getvalue())
