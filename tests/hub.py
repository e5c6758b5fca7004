"""A small hub that speaks the Hugging Face HTTP API for data sets and models, on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A data set or a model at one commit."""

    files: Mapping[str, bytes]
    is_gated: bool = False


@dataclass(kw_only=True)
class Hub:
    """A hub that is served."""

    url: str
    sent: list[tuple[str, int]] = field(default_factory=list)
    """Path and size of every piece of a file that was sent."""

    @property
    def num_bytes_sent(self) -> int:
        return sum(size for _, size in self.sent)


@contextmanager
def serve_hub(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Serve data sets and models by their names, `ORG/NAME`."""
    hub = Hub(url="")

    class Handler(_Handler):
        served = repositories
        sent = hub.sent

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Mapping[str, Repository]
    sent: list[tuple[str, int]]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        wanted = unquote(self.rfile.read(length).decode())
        _, _, org, name, *_ = unquote(urlsplit(self.path).path).strip("/").split("/")
        files = self.served[f"{org}/{name}"].files
        folders = {path.rpartition("/")[0] for path in files} - {""}
        found = [_entry(path, data) for path, data in files.items() if path in wanted]
        found += [_folder(path) for path in folders if f"paths={path}&" in f"{wanted}&"]
        self._json(found)

    def _answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        if not is_api and parts[0] != "datasets":
            parts = ["models", *parts]
        kind, org, name, *rest = parts[1:] if is_api else parts
        repository = self.served.get(f"{org}/{name}")
        if kind not in {"datasets", "models"} or repository is None:
            self._missing("RepoNotFound")
        elif not is_api:
            self._file(repository, rest, with_body=with_body)
        elif rest[:1] == ["tree"]:
            is_recursive = "recursive=true" in self.path.lower()
            self._json(_tree(repository, "/".join(rest[2:]), is_recursive=is_recursive))
        elif rest in ([], ["revision", "main"], ["revision", COMMIT]):
            siblings = [{"rfilename": path} for path in repository.files]
            about = {"_id": "1", "id": f"{org}/{name}", "sha": COMMIT, "siblings": siblings}
            self._json(about | {"gated": "auto" if repository.is_gated else False})
        else:
            self._missing("RevisionNotFound")

    def _file(self, repository: Repository, rest: list[str], *, with_body: bool) -> None:
        data = repository.files.get("/".join(rest[2:])) if rest[1:2] == [COMMIT] else None
        if repository.is_gated:
            self._missing("GatedRepo", status=401)
            return
        if data is None:
            self._missing("EntryNotFound")
            return
        first, last = self._range(len(data))
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if with_body:
            self.wfile.write(data[first : last + 1])
            self.sent.append((self.path, last + 1 - first))

    def _range(self, size: int) -> tuple[int, int]:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(first), min(int(last or size), size - 1)

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _missing(self, code: str, *, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def _tree(repository: Repository, folder: str, *, is_recursive: bool) -> list[dict[str, object]]:
    """Return the entries of a folder: all files and folders below it, or those directly in it."""
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, object]] = {}
    for path, data in repository.files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            name = prefix + "/".join(parts[:depth])
            found[name] = _folder(name)
        found[path] = _entry(path, data)
    direct = [name for name in found if "/" not in name.removeprefix(prefix)]
    return [found[name] for name in (found if is_recursive else direct)]


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _folder(path: str) -> dict[str, object]:
    return {"type": "directory", "path": path, "oid": _oid(path.encode())}


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
