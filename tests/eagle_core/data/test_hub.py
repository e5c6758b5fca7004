"""Hub data sets, against a small hub that speaks the Hugging Face HTTP API on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.waiting import LIMIT_SECONDS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(40)]
FILES = {
    "README.md": (
        b"---\nconfigs:\n- config_name: main\n  data_files: main.jsonl\n"
        b"- config_name: extra\n  data_files: extra.jsonl\n---\n"
    ),
    "main.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS[:30]).encode(),
    "extra.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS[30:]).encode(),
}
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


class Hub(BaseHTTPRequestHandler):
    """One data set, `org/set`, at one commit."""

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/datasets/"):
            self._file(with_body=True)
        elif path in (
            "/api/datasets/org/set", "/api/datasets/org/set/revision/main",
            f"/api/datasets/org/set/revision/{COMMIT}",
        ):  # fmt: skip
            siblings = [{"rfilename": name} for name in FILES]
            self._json({"_id": "1", "id": "org/set", "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/datasets/org/set/tree/{COMMIT}"):
            self._json([entry(name) for name in FILES])
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        wanted = self.rfile.read(length).decode()
        self._json([entry(name) for name in FILES if name in unquote(wanted)])

    def _file(self, *, with_body: bool) -> None:
        prefix = f"/datasets/org/set/resolve/{COMMIT}/"
        path = unquote(urlsplit(self.path).path)
        data = FILES.get(path.removeprefix(prefix)) if path.startswith(prefix) else None
        if data is None:
            self._missing("EntryNotFound")
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def entry(name: str) -> dict[str, object]:
    oid = hashlib.sha1(FILES[name], usedforsecurity=False).hexdigest()
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": oid}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def build(hub: str, home: Path, out: str, *, offline: object = False, **fields: object) -> str:
    """Build in a process of its own: the hub's address is read when its client is imported."""
    config = json.dumps({"name": "d", "source": "hf:org/set", **fields})
    done = subprocess.run(
        [sys.executable, "-c", BUILD, config, str(home / out)],
        env={
            **os.environ,
            "HF_ENDPOINT": hub,
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
def test_a_hub_data_set_is_pinned_cached_and_read_offline(hub: str, tmp_path: Path) -> None:
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
    assert found.startswith("TransientError the hub could not resolve")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "hf:org/none"}, "ConfigError the hub has no data set org/none"),
        ({"subsets": ["none"]}, "ConfigError org/set@01234567 has no subset none"),
        ({"subsets": ["main"], "split": "none"}, "with split none"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    hub: str, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    assert message in build(hub, tmp_path, "d", **fields)
