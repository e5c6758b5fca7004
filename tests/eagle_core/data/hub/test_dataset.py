"""Hub data sets, against a small hub that speaks the Hugging Face HTTP API on this machine."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import COMMIT, Hub, Repository, serve_hub
from tests.waiting import LIMIT_SECONDS

ROWS = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(40)]
BUILD = """
import sys
from pathlib import Path
from eagle_core.data.build import build_dataset
from eagle_core.data.config import DatasetConfig
config = DatasetConfig.model_validate_json(sys.argv[1])
try:
    print(build_dataset(config, out_dir=Path(sys.argv[2])).model_dump_json())
except Exception as error:
    print(type(error).__name__, error)
"""


def parquet(records: list[dict[str, object]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=10)
    return bytes(sink.getvalue())


def in_lines(records: Sequence[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


NOISE = random.Random(0)  # noqa: S311 (what does not compress, and no secret)
LARGE = [
    {"question": f"q{number}", "answer": f"a{number} {NOISE.randbytes(25_000).hex()}"}
    for number in range(400)
]
CARD = (
    b"---\nconfigs:\n- config_name: main\n  data_files: main.jsonl\n"
    b"- config_name: extra\n  data_files: extra.jsonl\n---\n"
)
CARD_THAT_LIES = (
    b"---\ndataset_info:\n  features:\n  - name: question\n    dtype: string\n"
    b"  - name: answer\n    dtype: string\n  splits:\n  - name: train\n    num_bytes: 9\n"
    b"    num_examples: 7\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n"
)
REPOSITORIES = {
    "org/set": Repository(
        files={
            "README.md": CARD,
            "main.jsonl": in_lines(ROWS[:30]),
            "extra.jsonl": in_lines(ROWS[30:]),
        }
    ),
    "org/large": Repository(
        files={f"data/train-{n}-of-4.parquet": parquet(LARGE[n::4]) for n in range(4)}
    ),
    "org/gated": Repository(files={"a.jsonl": in_lines(ROWS)}, is_gated=True),
    "org/script": Repository(files={"script.py": b"import datasets", "README.md": b""}),
    "org/bare": Repository(files={".gitattributes": b""}),
    "org/cut": Repository(files={"a.parquet": parquet(LARGE[:40])[:-2000]}),
    "org/broken": Repository(files={"a.jsonl": in_lines(ROWS) + b'{"question": '}),
    "org/mixed": Repository(
        files={"a.jsonl": in_lines(ROWS), "b.jsonl": in_lines([{"id": 1, "text": "t"}] * 9)}
    ),
    "org/lies": Repository(files={"README.md": CARD_THAT_LIES, "a.jsonl": in_lines(ROWS)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve_hub(REPOSITORIES) as served:
        yield served


def build(
    hub: Hub | str, home: Path, out: str, *, offline: object = False, **fields: object
) -> str:
    """Build in a process of its own: the hub's address is read when its client is imported."""
    config = json.dumps({"name": "d", "source": "hf:org/set", **fields})
    done = subprocess.run(
        [sys.executable, "-c", BUILD, config, str(home / out)],
        env={
            **os.environ,
            "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": str(int(bool(offline))),
            "NO_PROXY": "127.0.0.1",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_hub_data_set_is_pinned_cached_and_read_offline(hub: Hub, tmp_path: Path) -> None:
    manifest = json.loads(build(hub, tmp_path, "one", subsets=["main", "extra"]))
    assert manifest["num_records"] == 40
    assert manifest["source"] == [
        {"repository": "org/set", "commit": COMMIT, "subsets": ["main", "extra"], "split": "train"}
    ]
    cached = build(hub, tmp_path, "two", subsets=["main", "extra"], revision=COMMIT, offline=True)
    assert json.loads(cached)["fingerprint"] == manifest["fingerprint"]
    unpinned = build(hub, tmp_path, "three", subsets=["main"], offline=True)
    assert unpinned.startswith("ConfigError the hub is disabled")
    other = build(hub, tmp_path, "four", subsets=["main"], revision="f" * 40, offline=True)
    assert other.startswith("MismatchError org/set: requested commit ffff")


def test_a_hub_that_does_not_answer_is_worth_another_try(tmp_path: Path) -> None:
    found = build("http://127.0.0.1:9", tmp_path, "d", subsets=["main"])
    assert found.startswith("TransientError org/set is not in the cache and the hub is unreachable")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "hf:org/none"}, "ConfigError the hub has no data set org/none"),
        ({"subsets": ["none"]}, "ConfigError org/set/none/train@01234567 does not exist"),
        (
            {"subsets": ["main"], "split": "none"},
            "ConfigError org/set/main/none@01234567 does not exist",
        ),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    hub: Hub, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    assert message in build(hub, tmp_path, "d", **fields)


@pytest.mark.slow
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "hf:org/gated"}, r"ConfigError .*gated: accept its conditions.*HF_TOKEN"),
        ({"source": "hf:org/script"}, r"ConfigError .*script.*refs/convert/parquet"),
        ({"source": "hf:org/bare"}, r"ConfigError .*no files that `datasets` reads.*hf://"),
        ({"source": "hf:org/cut"}, r"CorruptError org/cut/train@01234567 cannot be read"),
        ({"source": "hf:org/broken"}, r"CorruptError org/broken/train@01234567 cannot be read"),
        ({"revision": "none"}, r"ConfigError org/set@none does not exist.*`revision`"),
        ({"revision": "f" * 40}, r"ConfigError (org/set|the hub has no).*f{8}.*`revision`"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_datasets_raises_is_one_message(
    hub: Hub, tmp_path: Path, fields: dict[str, object], message: str, *, is_streamed: bool
) -> None:
    found = build(hub, tmp_path, "d", streaming=is_streamed, **fields)
    assert re.match(message, found), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:org/mixed", r"ConfigError .*files of different columns"),
        ("hf:org/lies", r"CorruptError .*is not what its card says.*hf cache rm"),
    ],
)
def test_what_datasets_finds_while_it_stores_is_one_message(
    hub: Hub, tmp_path: Path, source: str, message: str
) -> None:
    found = build(hub, tmp_path, "d", source=source)
    assert re.match(message, found), found


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_a_disk_error(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "datasets").symlink_to("/proc/nowhere")
    found = build(hub, tmp_path, "d", source="hf:org/large")
    assert re.match(r"DiskError org/large/train@01234567 cannot be stored.*HF_HOME", found), found


@pytest.mark.slow
def test_streaming_reads_what_is_needed_and_makes_the_same_data_set(
    hub: Hub, tmp_path: Path
) -> None:
    size = sum(map(len, REPOSITORIES["org/large"].files.values()))
    hub.sent.clear()
    some = {"source": "hf:org/large", "max_conversations": 12}
    first = json.loads(build(hub, tmp_path, "one", streaming=True, **some))
    assert first["num_records"] == 12
    assert hub.num_bytes_sent < size / 2
    hub.sent.clear()
    files = {**some, "source": "hf://datasets/org/large/data/*.parquet"}
    by_name = json.loads(build(hub, tmp_path, "two", **files))
    assert hub.num_bytes_sent < size / 2
    whole = json.loads(build(hub, tmp_path, "three", **some))
    assert first["fingerprint"] == by_name["fingerprint"] == whole["fingerprint"]
    assert first["config"] == whole["config"]
    assert first["source"] == whole["source"]
    names = [file["name"] for file in by_name["source"]]
    assert names == [f"train-{n}-of-4.parquet" for n in range(4)]
    assert {file["commit"] for file in by_name["source"]} == {COMMIT}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ("org/set/none.jsonl", {}, "ConfigError no file at hf://datasets/org/set@0123"),
        ("org/none/a.jsonl", {}, "ConfigError the hub has no data set org/none"),
        ("org/set", {}, "ConfigError hf://datasets/org/set names no file"),
        ("org/set@main/main.jsonl", {"revision": "main"}, "already names a revision"),
        ("org/gated/a.jsonl", {}, "status 401"),
        ("org/set@none/main.jsonl", {}, "ConfigError org/set@none does not exist"),
    ],
)
def test_files_that_the_hub_does_not_have_are_named(
    hub: Hub, tmp_path: Path, source: str, fields: dict[str, object], message: str
) -> None:
    assert message in build(hub, tmp_path, "d", source=f"hf://datasets/{source}", **fields)


@pytest.mark.slow
def test_files_of_the_hub_are_read_by_name(hub: Hub, tmp_path: Path) -> None:
    for source in ("org/set/main.jsonl", f"org/set@{COMMIT}/main.jsonl", "org/set@main/m*.jsonl"):
        manifest = json.loads(build(hub, tmp_path, "d", source=f"hf://datasets/{source}"))
        assert manifest["num_records"] == 30
        assert manifest["source"][0]["commit"] == COMMIT
