"""A child process that answers each request with lines, pausing before each, and then may hang."""

import sys
import time

from pydantic import BaseModel

from flows.child_process import say, say_ended


class Talk(BaseModel):
    """What it is asked to do."""

    pauses: tuple[float, ...]
    """Seconds of silence before each line."""
    is_ending: bool = True


if __name__ == "__main__":
    for request in sys.stdin:
        talk = Talk.model_validate_json(request)
        for pause in talk.pauses:
            time.sleep(pause)
            say(talk)
        if talk.is_ending:
            say_ended()
        else:
            time.sleep(600)
