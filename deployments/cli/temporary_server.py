"""The Prefect server of one `eyas run`: serves on the port that its argument names.

It ends when its standard input does, which a kill of the run closes, too.
"""

import os
import signal
import sys
import threading

import uvicorn


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="error",
    )
