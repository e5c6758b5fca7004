"""Answers in place of vLLM, as `eyas_engine.py` does: for the ways of an engine that are rare.

States are the prompt's tokens. A prompt decides what happens by its first token.
"""

import json
import os
import signal
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

DIES, FAILS, FILLS, SWELLS, LATE = range(500, 505)
FAILURES = {
    FAILS: "RuntimeError: a device failed",
    FILLS: "OSError: its states cannot be written: full",
    SWELLS: "OutOfMemoryError: CUDA",
}
HIDDEN = 64


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    settings = json.loads(sys.stdin.readline())
    start(settings["engine"]["quantization"], answers)
    answer(answers, {"max_length": 20})
    for number, line in enumerate(sys.stdin):
        states = Path(settings["folder"]) / "states" / str(number)
        run(json.loads(line), states, len(settings["outputs"]) * HIDDEN, answers)


def answer(answers: TextIO, line: object) -> None:
    print(json.dumps(line), file=answers, flush=True)


def start(quantization: str | None, answers: TextIO) -> None:
    if quantization == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if quantization == "unsaid":
        print("no such library", file=sys.stderr)
        sys.exit(5)
    if quantization:
        print("see the log: some library is missing", flush=True)
        answer(answers, {"failure": "ValueError: no such method"})
        if "aborts" in quantization:
            os.abort()
        sys.exit(1)


def run(prompts: Sequence[Sequence[int]], states: Path, width: int, answers: TextIO) -> None:
    late = []
    for place, prompt in enumerate(prompts):
        if prompt[0] == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt[0] in FAILURES:
            answer(answers, {"failure": FAILURES[prompt[0]]})
            sys.exit(1)
        path = states.with_name(f"{states.name}-{place}")
        path.write_bytes(array("f", [token for token in prompt for _ in range(width)]).tobytes())
        done = {"place": place, "file": str(path), "token": 1, "logprob": -90.0}
        if prompt[0] == LATE:
            late.append(done)
        else:
            answer(answers, done)
    for done in late:
        answer(answers, done)


if __name__ == "__main__":
    main()
