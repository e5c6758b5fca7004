"""Answers in place of vLLM, as `eyas_engine.py` does: for the ways of an engine that are rare.

States are the prompt's tokens. A prompt decides what happens by its first token.
"""

import json
import os
import signal
import sys
from array import array
from pathlib import Path

DIES, FAILS, LATE = 7, 8, 9
HIDDEN = 64


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    settings = json.loads(sys.stdin.readline())
    if settings["engine"]["quantization"] == "impossible":
        print(json.dumps({"failure": "ValueError: no such method"}), file=answers, flush=True)
        sys.exit(1)
    if settings["engine"]["quantization"] == "unsaid":
        print("no such library", file=sys.stderr)
        sys.exit(5)
    print(json.dumps({"max_length": 20}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        prompts = json.loads(line)
        late = []
        for place, prompt in enumerate(prompts):
            if prompt[0] == DIES:
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt[0] == FAILS:
                print(json.dumps({"failure": "OSError: disk full"}), file=answers, flush=True)
                sys.exit(1)
            path = Path(settings["folder"]) / f"{number}-{place}"
            width = len(settings["outputs"]) * HIDDEN
            path.write_bytes(
                array("f", [token for token in prompt for _ in range(width)]).tobytes()
            )
            answer = {"place": place, "file": str(path), "token": 1, "logprob": -90.0}
            if prompt[0] == LATE:
                late.append(answer)
            else:
                print(json.dumps(answer), file=answers, flush=True)
        for answer in late:
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
