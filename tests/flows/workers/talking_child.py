"""A child process that answers each request with lines, pausing before each, and then may hang."""

import sys
import time

from pydantic import BaseModel

from flows.workers.channel import send, serve

_KINDS = {kind.__name__: kind for kind in (TypeError, RuntimeError, MemoryError)}


class Talk(BaseModel):
    """What it is asked to do."""

    pauses: tuple[float, ...]
    """Seconds of silence before each line."""
    is_ending: bool = True
    padding: str = ""
    error: str = ""
    """Of the exception that it raises."""
    kind: str = "TypeError"


def talk(request: Talk) -> None:
    """Say what is asked for."""
    for pause in request.pauses:
        time.sleep(pause)
        print("a library prints this")
        send(request)
    if request.error:
        raise _KINDS[request.kind](request.error)
    if not request.is_ending:
        time.sleep(600)


if __name__ == "__main__":
    print("printed at import", flush=True)
    sys.exit(serve(Talk, talk))
