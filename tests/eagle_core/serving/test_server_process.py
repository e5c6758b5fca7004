"""A server that is started, missed when it is gone, and ended with what started it."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from eagle_core.errors import ConfigError, TransientError
from eagle_core.serving import server_process
from eagle_core.serving.engine import Launch
from eagle_core.serving.server_process import serving
from tests.waiting import wait_for

SERVER = """\
import http.server, os, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("out of luck", flush=True)
            os._exit(3)
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def launch(port: int, program: str = SERVER) -> Launch:
    """Return how to start a server in Python."""
    return Launch(command=(sys.executable, "-c", program, str(port)), environment=os.environ)


def test_a_server_answers_until_the_block_ends() -> None:
    with serving("Test 1", launch) as server, server.client() as client:
        assert client.get("/").status_code == 200
        guard = psutil.Process(server.pid)
        (child,) = guard.children()
    assert not guard.is_running()
    wait_for(lambda: not child.is_running(), what="the server's end")


def test_a_server_that_does_not_start_says_why() -> None:
    failing = "import sys; print('no such model'); sys.exit(4)"
    with (
        pytest.raises(ConfigError, match=r"Test 1 does not start: status 4\n  no such model"),
        serving("Test 1", lambda port: launch(port, failing)),
    ):
        pass


def test_a_server_that_dies_is_a_transient_error() -> None:
    with (
        pytest.raises(TransientError, match=r"Test 1 ended while it served: status 3\n(.|\n)*luck"),
        serving("Test 1", launch) as server,
        server.client() as client,
    ):
        client.get("/die")


def test_a_server_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    note, folder = tmp_path / "pid", tmp_path / "temporary"
    folder.mkdir()
    guard = Path(server_process.__file__).with_name("guard.py")
    program = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    starter = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {str(guard)!r}, {str(folder)!r},\n"
        f"    sys.executable, '-c', {program!r}],\n"
        "    stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    wait_for(lambda: note.exists() and note.read_text() != "", what="the server")
    served = psutil.Process(int(note.read_text()))
    process.kill()
    process.wait()
    wait_for(
        lambda: not served.is_running() or served.status() == psutil.STATUS_ZOMBIE,
        what="the server's end",
    )
    wait_for(lambda: not folder.exists(), what="the end of its temporary files")


TIDY = """\
import os, signal, subprocess, sys, tempfile
from pathlib import Path
temporary = Path(tempfile.mkstemp()[1])
assert Path(os.environ["VLLM_RPC_BASE_PATH"]) == temporary.parent
note, shared = map(Path, sys.argv[2:])
shared.touch()
note.write_text(str(temporary.parent))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def end(*_):
    child.kill()
    child.wait()
    shared.unlink()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
"""
"""A server with a child, and with a file that only it can remove."""


def test_a_server_ends_in_order_and_leaves_no_files(tmp_path: Path) -> None:
    note, shared = tmp_path / "note", tmp_path / "shared"

    def tidy(port: int) -> Launch:
        plain = launch(port, TIDY + SERVER)
        return replace(plain, command=(*plain.command, str(note), str(shared)))

    with serving("Test 1", tidy):
        assert shared.exists()
        folder = Path(note.read_text())
        assert folder.is_dir()
        assert folder != Path(tempfile.gettempdir())
    assert not shared.exists()
    assert not folder.exists()


def test_a_server_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER
    monkeypatch.setattr(server_process, "_CLOSE_SECONDS", 0.1)  # as if the guard hung
    with serving("Test 1", lambda port: launch(port, stubborn)) as server:
        (child,) = psutil.Process(server.pid).children()
    wait_for(lambda: not child.is_running(), what="the server's end")


def test_a_client_knows_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serving("Test 1", launch) as server, server.client() as client:
        assert isinstance(client.get("/"), httpx.Response)


def test_another_server_on_the_port_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("Test 1", launch) as server:
        port = httpx.URL(server.url).port
        monkeypatch.setattr(server_process, "_free_port", lambda: port)
        with pytest.raises(ConfigError, match="Test 2 does not start"), serving("Test 2", launch):
            pass
