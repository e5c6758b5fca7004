"""The Prefect server of one `eyas run`: serves on the port given as its argument.

It ends when its standard input closes, which a kill of the run causes too.
"""

import os
import signal
import sys
import threading

import uvicorn


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="error",
    )
