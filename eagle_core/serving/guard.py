"""Runs a command that ends with its parent: `python guard.py COMMAND...`, whose stdin is a pipe.

When the pipe closes because the parent ended, in whatever way, the command and all of its processes
are killed. It imports nothing of Eyas: it starts in no time.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Run the command, and exit with its status."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_kill_after_parent, daemon=True).start()
    status = process.wait()
    os._exit(status % 256)  # not sys.exit: the thread is in the middle of reading


def _kill_after_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)  # the group is that of this process, which leads it


if __name__ == "__main__":
    main()
