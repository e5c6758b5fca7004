"""Runs a command that ends with its parent: `python guard.py FOLDER COMMAND...`.

Its stdin is a pipe. When that closes, because the parent closes it or has ended in whatever way,
the command is terminated; whatever is left of its processes after some seconds is killed, and
FOLDER, which holds their temporary files, is removed. It imports nothing of Eyas: it starts in no
time.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

END_SECONDS = 5.0
"""For an orderly end, in which an engine removes its sockets and shared memory."""
_PAUSE_SECONDS = 0.02


def main() -> None:
    """Run the command, and exit with its status, or end it with the parent."""
    _, folder, *command = sys.argv
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    is_ending = threading.Event()
    threading.Thread(target=_exit_with, args=(process, is_ending), daemon=True).start()
    while os.read(sys.stdin.fileno(), 1):
        pass
    is_ending.set()
    try:
        _terminate()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)  # the group is that of this process, which leads it


def _exit_with(process: "subprocess.Popen[bytes]", is_ending: threading.Event) -> None:
    status = process.wait()
    if not is_ending.is_set():
        os._exit(status % 256)  # not sys.exit: the main thread is in the middle of reading


def _terminate() -> None:
    """Ask the command to end, and wait for it and all that it started."""
    import psutil  # noqa: PLC0415 (it takes longer than the rest)

    this = psutil.Process()
    family = this.children(recursive=True)
    for process in this.children():
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            process.terminate()
    deadline = time.monotonic() + END_SECONDS
    while any(map(_runs, family)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)


def _runs(process: "psutil.Process") -> bool:
    """Return whether it has not ended; one that nobody has waited for has."""
    import psutil  # noqa: PLC0415 (see above)

    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    main()
