"""An engine whose server notes what it is asked, and ends when it is told to."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from eagle_core.decoding.sampling_limits import SamplingLimits
from eagle_core.serving.engine import EngineDecoder, Launch
from eagle_core.serving.served import Served

SERVER = """\
import http.server, json, os, sys
port, log, num_prompt_tokens, last, ended = int(sys.argv[1]), *sys.argv[2:]
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(log, "a") as file:
            file.write(json.dumps(body) + "\\n")
        if sum(1 for _ in open(log)) == int(last):
            print("out of luck", flush=True)
            os._exit(3)
        message = {"role": "assistant", "content": "answer %s" % body.get("seed")}
        usage = {"prompt_tokens": int(num_prompt_tokens), "completion_tokens": 3}
        self.reply({"choices": [{"finish_reason": ended, "message": message}], "usage": usage})
    def reply(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


class NotingEngine:
    """Serves a program that writes each request to a file."""

    title = "Test 1"

    def __init__(
        self,
        log: Path,
        *,
        num_prompt_tokens: int = 1,
        last_request: int = 0,
        needed_length: int = 0,
    ) -> None:
        """Count the tokens of every prompt as `num_prompt_tokens`; end at the last request.

        Every answer is cut where less than `needed_length` tokens of a conversation are held.
        """
        self._log = log
        self._needed_length = needed_length
        self._arguments = (str(log), str(num_prompt_tokens), str(last_request))
        self.served: list[Served] = []
        """Of every start."""

    def requests(self) -> list[dict[str, object]]:
        """Return the bodies, in the order in which they came."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def prepare(self, served: Served) -> None:
        """Note what is served."""
        self.served.append(served)

    def launch(self, served: Served, *, port: int) -> Launch:
        """Return how to start the program."""
        assert served is self.served[-1]
        ended = "length" if served.max_length < self._needed_length else "stop"
        command = (sys.executable, "-c", SERVER, str(port), *self._arguments, ended)
        return Launch(command=command, environment=os.environ)

    def decoder(self, client: httpx.Client, served: Served) -> EngineDecoder:
        """Refuse: it writes no tokens."""
        raise NotImplementedError

    def samplers(self, served: Served, limits: SamplingLimits) -> Mapping[str, object]:
        """Return the limits under names of its own."""
        assert served is self.served[-1]
        return {"its_top_p": limits.top_p}
