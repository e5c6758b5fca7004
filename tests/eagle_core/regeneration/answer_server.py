"""A small OpenAI-compatible server on loopback that fails as it is told and keeps count."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Body = dict[str, Any]
Talk = Callable[[Body], dict[str, Any]]
"""From a request to the `choices[0]` of its completion."""
Response = tuple[int, str]
"""Status and body."""
Fault = Callable[[int, Body], str | Response | None]
"""From how often these messages were asked before, and the request, to what goes wrong."""

SENT = {
    "half": (200, '{"choices": [{"finish_reason":'),
    "hollow": (200, '{"choices": []}'),
    "long": (400, "This model's maximum context length is 16 tokens. However, you requested 20."),
}
"""Kinds of fault that are a whole response."""


@dataclass(kw_only=True)
class Server:
    """What happened so far."""

    url: str = ""
    requests: list[Body] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Authorization headers."""
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by their messages."""
    most_open: int = 0
    num_open: int = 0
    lock: Lock = field(default_factory=Lock)

    @contextmanager
    def take(self, body: Body, key: str) -> Iterator[int]:
        """Count a request while it is open; yield how often its messages came before."""
        text = json.dumps(body["messages"])
        with self.lock:
            times = self.asked[text]
            self.asked[text] += 1
            self.requests.append(body)
            self.keys.append(key)
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        try:
            yield times
        finally:
            with self.lock:
                self.num_open -= 1

    def asked_about(self, opening: str) -> int:
        """Return how often a conversation's first question was asked."""
        return sum(
            count
            for text, count in self.asked.items()
            if [one["content"] for one in json.loads(text)] == [opening]
        )


def say(text: str, *, finish_reason: str = "stop") -> dict[str, Any]:
    """Return a choice."""
    return {"finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}


def echo(body: Body) -> dict[str, Any]:
    """Answer with the question and how many turns came before it."""
    return say(f"re({len(body['messages'])}): {body['messages'][-1]['content']}")


class Handler(BaseHTTPRequestHandler):
    """Answers one request as its server is told to."""

    protocol_version = "HTTP/1.1"
    server: "_Http"

    def do_POST(self) -> None:
        """Count, then answer or fail."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.seen.take(body, self.headers.get("Authorization", "")) as times:
            self._answer(body, self.server.fault(times, body))

    def _answer(self, body: Body, kind: str | Response | None) -> None:
        if self.path != "/v1/chat/completions":
            self._send(404, "no such page")
        elif kind is None:
            choice, usage = self.server.talk(body), {"completion_tokens": 3}
            self._send(200, json.dumps({"choices": [choice], "usage": usage}))
        elif isinstance(kind, tuple):
            self._send(*kind)
        elif kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        else:
            self._send(*SENT.get(kind) or (int(kind), f"fault {kind}"))

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_arguments: object) -> None:
        """Stay silent."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    seen: Server
    talk: Talk
    fault: Fault

    def handle_error(self, *_arguments: object) -> None:
        """Clients that are killed hang up."""


@contextmanager
def serving(talk: Talk = echo, fault: Fault = lambda _times, _body: None) -> Iterator[Server]:
    """Serve while the block runs."""
    with _Http(("127.0.0.1", 0), Handler) as http:
        http.seen = Server(url=f"http://127.0.0.1:{http.server_address[1]}/v1")
        http.talk, http.fault = talk, fault
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield http.seen
        finally:
            http.shutdown()
            thread.join()
