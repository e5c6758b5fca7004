"""What a file system raises, of whatever class and wherever, is one message of ours."""

import bz2
import errno
import gzip
import io
import lzma
import random
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from eagle_core.data.config import DatasetConfig
from eagle_core.data.sources import find_source, identify, read_records
from eagle_core.errors import ConfigError, DiskError, TransientError


class EndpointConnectionError(Exception):
    """As in botocore, whose classes have this base and are no `OSError`."""


class ConnectTimeoutError(EndpointConnectionError, TimeoutError):
    """As in botocore."""


class NoCredentialsError(Exception):
    """As in botocore."""


class AnsweredError(Exception):
    """As in aiohttp: an answer with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}\nand more")
        self.status = status


FAULTS = [
    (ConnectTimeoutError("no route"), TransientError, "does not answer .*no route"),
    (ConnectionResetError(errno.ECONNRESET, "reset"), TransientError, "does not answer"),
    (AnsweredError(503), TransientError, "does not answer .*status 503 and more"),
    (AnsweredError(429), TransientError, "does not answer"),
    (AnsweredError(403), ConfigError, "refuses access with status 403"),
    (NoCredentialsError("Unable to locate"), ConfigError, "Unable to locate.*credentials"),
    (PermissionError(errno.EACCES, "Access Denied"), ConfigError, "Access Denied.*this user"),
    (ImportError("Install pyopenssl"), ConfigError, "pyopenssl; install the package"),
    (OSError(errno.EIO, "Input/output error"), DiskError, "Input/output error.*check the disk"),
    (KeyError(), ConfigError, "cannot read .*KeyError"),
]


class _FaultyFile(io.BytesIO):
    """Gives half of its bytes, and then a fault."""

    def __init__(self, data: bytes, error: Exception) -> None:
        super().__init__(data)
        self._num_left = len(data) // 2
        self._error = error

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._num_left -= len(data)
        if self._num_left < 0:
            raise self._error
        return data


class Faulty(LocalFileSystem):
    """A local folder, behind a file system that fails where it is told to."""

    protocol = "faulty"
    cachable = False
    error: Exception
    where: str

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("faulty://")

    def info(self, path: str, **options: Any) -> Any:
        if self.where == "info":
            raise self.error
        return super().info(path, **options)

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        if self.where == "open":
            raise self.error
        opened = super().open(path, *arguments, **options)
        return _FaultyFile(opened.read(), self.error) if self.where == "read" else opened


@pytest.fixture
def faulty() -> type[Faulty]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    return Faulty


@pytest.mark.parametrize("where", ["info", "open"])
@pytest.mark.parametrize(("error", "kind", "message"), FAULTS, ids=lambda v: type(v).__name__)
def test_any_fault_of_a_file_system_is_one_message(
    tmp_path: Path,
    faulty: type[Faulty],
    where: str,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    faulty.error, faulty.where = error, where
    config = DatasetConfig(name="d", source=f"faulty://{tmp_path}/a.jsonl")
    with pytest.raises(kind, match=message) as caught:
        list(read_records(config))
    assert "a.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


NOISE = random.Random(1).randbytes(400_000).hex()  # noqa: S311 (what does not compress, no secret)
TABLE = pa.Table.from_pylist([{"a": NOISE[first : first + 99]} for first in range(0, 800_000, 99)])


def lines() -> bytes:
    return b"".join(b'{"a": "%s"}\n' % row["a"].encode() for row in TABLE.to_pylist())


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink, row_group_size=500, compression="none", use_dictionary=False)
    return sink.getvalue()


def feather() -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(TABLE, sink, compression="uncompressed", chunksize=500)
    return sink.getvalue()


def zstd() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(lines())
    return bytes(sink.getvalue())


FILES = {
    "a.jsonl": lines,
    "a.csv": lambda: b"a\n" + b"\n".join(row["a"].encode() for row in TABLE.to_pylist()),
    "utf16.jsonl": lambda: lines().decode().encode("utf-16"),
    "a.jsonl.gz": lambda: gzip.compress(lines()),
    "a.jsonl.bz2": lambda: bz2.compress(lines()),
    "a.jsonl.xz": lambda: lzma.compress(lines()),
    "a.jsonl.zst": zstd,
    "a.parquet": parquet,
    "a.feather": feather,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("error", "kind", "message"), [FAULTS[0], FAULTS[5], FAULTS[8]], ids=["away", "refused", "disk"]
)
def test_a_fault_in_the_middle_is_not_taken_for_damage(
    tmp_path: Path,
    faulty: type[Faulty],
    name: str,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    faulty.error, faulty.where = error, "read"
    config = DatasetConfig(name="d", source=f"faulty://{tmp_path}/{name}")
    with pytest.raises(kind, match=message):
        list(read_records(config))
    faulty.where = "nowhere"
    assert len(list(read_records(config))) == TABLE.num_rows


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nosuch://bucket/a.jsonl", "nosuch"),
        ("abfs://container/a.jsonl", "adlfs.*install the package"),
    ],
)
def test_an_address_that_no_library_here_reads_is_named(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot read {source}.*{message}"):
        find_source(DatasetConfig(name="d", source=source))


def test_a_digest_that_cannot_be_made_is_one_message(tmp_path: Path, faulty: type[Faulty]) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    faulty.error, faulty.where = NoCredentialsError("Unable to locate"), "nowhere"
    found = find_source(DatasetConfig(name="d", source=f"faulty://{tmp_path}/a.jsonl"))
    faulty.where = "open"
    with pytest.raises(ConfigError, match=r"a\.jsonl: NoCredentialsError: Unable to locate"):
        identify(found)
