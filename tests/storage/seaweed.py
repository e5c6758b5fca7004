"""An S3 server that asks for credentials, and a way through it that fails on demand."""

import http.client
import json
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs

from tests import needs

BUCKET = "eyas"
START_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Where a server listens and who may use it."""

    url: str
    access_key: str
    secret_key: str

    @property
    def variables(self) -> dict[str, str]:
        """Return the usual AWS variables that lead to this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def seaweed(
    folder: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()
) -> Iterator[S3Server]:
    """Run SeaweedFS with one bucket until the block ends; skip the test where there is none.

    `prefix` stands before its command, such as one that runs it on another host.
    """
    weed = needs.SEAWEED.path
    if weed is None:
        pytest.skip(needs.SEAWEED.reason)
    port, *others = _free_ports(8)
    server = S3Server(
        url=f"http://{address}:{port}",
        access_key=secrets.token_hex(10),
        secret_key=secrets.token_hex(20),
    )
    keys = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config = {"identities": [{"name": "tests", "credentials": keys, "actions": actions}]}
    (folder / "s3.json").write_text(json.dumps(config))
    names = (
        "s3.port.grpc",
        *(f"{n}.port{g}" for n in ("master", "volume", "filer") for g in ("", ".grpc")),
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(*prefix, weed, "-logtostderr=true", "server"),
                *(f"-ip={address}", f"-ip.bind={address}"),
                *("-s3", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0"),  # their defaults are fixed ports
                *("-volume.max=20", "-master.volumeSizeLimitMB=256", f"-dir={folder}"),
                *(f"-{name}={other}" for name, other in zip(names, others, strict=True)),
            ],
            stdout=log,
            stderr=log,
        )
        try:
            _make_bucket(server, process)
            yield server
        finally:
            process.kill()
            process.wait()


def _make_bucket(server: S3Server, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the server makes a bucket: the filer opens a little later than the port."""
    until = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, "SeaweedFS ended at once"
        client = s3fs.S3FileSystem(
            key=server.access_key,
            secret=server.secret_key,
            endpoint_url=server.url,
            skip_instance_cache=True,
        )
        try:
            client.mkdir(BUCKET)
        except OSError:
            assert time.monotonic() < until, f"SeaweedFS is not ready after {START_SECONDS} s"
            time.sleep(0.2)
        else:
            return


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the proxy says instead of the server; without a status it hangs up."""

    status: int | None
    code: str = ""


SLOW_DOWN = Answer(status=503, code="SlowDown")
HANG_UP = Answer(status=None)
HALF_WAY = Answer(status=None, code="half")  # the server's answer, cut in its middle


@dataclass(kw_only=True)
class FaultyProxy:
    """A way to the server on which `fault`, asked about each request, may take its place."""

    url: str
    fault: Callable[[str, str], Answer | None] = field(default=lambda method, path: None)  # noqa: ARG005
    seen: list[str] = field(default_factory=list)
    """Method and path of every request so far."""


HOP_HEADERS = frozenset({"content-length", "connection", "transfer-encoding"})


class ProxyHandler(BaseHTTPRequestHandler):
    """Answers one connection of the proxy of its server."""

    protocol_version = "HTTP/1.1"
    server: "ProxyServer"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.proxy.seen.append(f"{self.command} {self.path}")
        answer = self.server.proxy.fault(self.command, self.path)
        if answer is HANG_UP:
            self.close_connection = True
        elif answer is None or answer is HALF_WAY:
            self._pass_on(body, half=answer is HALF_WAY)
        else:
            error = f"<Error><Code>{answer.code}</Code><Message>no</Message></Error>"
            self._reply(answer.status or 500, [], error.encode())

    def _pass_on(self, body: bytes, *, half: bool) -> None:
        target = urlsplit(self.server.target)
        host, port = target.hostname or "", target.port or 80
        with closing(http.client.HTTPConnection(host, port, timeout=30)) as link:
            link.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # the host too: it is signed
                link.putheader(name, value)
            link.endheaders(body)
            reply = link.getresponse()
            data = reply.read()
            headers = [pair for pair in reply.getheaders() if pair[0].lower() not in HOP_HEADERS]
            length = reply.getheader("Content-Length")
        self._reply(reply.status, headers, data, length=length, half=half)

    def _reply(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        *,
        length: str | None = None,
        half: bool = False,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)
        self.close_connection = self.close_connection or half

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


class ProxyServer(ThreadingHTTPServer):
    """Listens for a `FaultyProxy`."""

    daemon_threads = True

    def __init__(self, proxy: FaultyProxy, target: str) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.proxy = proxy
        self.target = target
        proxy.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def faulty_proxy(server: S3Server) -> Iterator[FaultyProxy]:
    """Stand in front of a server until the block ends."""
    proxy = FaultyProxy(url="")
    with ProxyServer(proxy, server.url) as listener:
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            listener.shutdown()
            thread.join()
