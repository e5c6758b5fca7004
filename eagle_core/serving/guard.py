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
    sys.exit(process.wait() % 256)


def _kill_after_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)  # the group is that of this process, which leads it


if __name__ == "__main__":
    main()
