"""The process that runs a target in vLLM: prompts in, files of hidden states out.

    python eyas_engine.py DESCRIPTOR < requests

The first line of standard input is a JSON object of settings, each later one a list of prompts
(lists of token ids). Each answer is a line of JSON on the file descriptor. When standard input
ends, so does the process, whatever it is doing: nobody reads its states.
"""

import itertools
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from eyas_connector import FAILED, FOLDER, PART
from vllm import LLM, SamplingParams, TokensPrompt

_WAIT_SECONDS = 0.001


class Engine:
    """vLLM with the target loaded, and a folder for the states of its requests."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._folder = Path(settings["folder"]) / "states"
        self._engine = LLM(
            **settings["engine"],
            speculative_config={
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {
                    "hf_config": {"eagle_aux_hidden_state_layer_ids": settings["outputs"]}
                },
            },
            kv_transfer_config={
                "kv_connector": "EyasConnector",
                "kv_connector_module_path": "eyas_connector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {FOLDER: str(self._folder)},
            },
        ).llm_engine
        self._names = itertools.count()
        self._sampling = SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=1, ignore_eos=True, detokenize=False
        )

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt that fits, with the one that follows it."""
        return int(self._engine.model_config.max_model_len) - 1

    def run(self, prompts: Sequence[Sequence[int]], answers: TextIO) -> None:
        """Run prompts together; answer each when its file is complete.

        All are known to the scheduler before the first step, so that the same prompts share the
        same steps, and round the same way.
        """
        places: dict[str, int] = {}
        for place, prompt in enumerate(prompts):
            name = str(next(self._names))
            places[name] = place
            self._engine.add_request(
                name, TokensPrompt(prompt_token_ids=list(prompt)), self._sampling
            )
        predicted: dict[str, dict[str, float]] = {}
        while places:
            for output in self._engine.step():
                predicted[output.request_id] = _own_prediction(output)
            written = self._written()
            for name in sorted(written.keys() & predicted.keys() & places.keys(), key=int):
                place = places.pop(name)
                line = {"place": place, "file": str(written[name]), **predicted[name]}
                print(json.dumps(line), file=answers, flush=True)
            if not self._engine.has_unfinished_requests():
                time.sleep(_WAIT_SECONDS)  # for steps that only free blocks, and for the writers

    def _written(self) -> dict[str, Path]:
        """Return complete files by the name of their request; vLLM adds a suffix to each."""
        found: dict[str, Path] = {}
        for path in self._folder.iterdir():
            if path.suffix == FAILED:
                raise OSError(f"its states cannot be written: {path.read_text()}")
            if path.suffix != PART:
                found[path.name.partition("-")[0]] = path
        return found


def _own_prediction(output: Any) -> dict[str, float]:
    """Return the token that vLLM would write next, and its own log-probability in nats."""
    completion = output.outputs[0]
    token = completion.token_ids[0]
    return {"token": token, "logprob": completion.logprobs[0][token].logprob}


def _read(requests: "queue.SimpleQueue[str]", folder: Path) -> None:
    """Queue lines; end the process when there are no more."""
    for line in sys.stdin:
        requests.put(line)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # vLLM's other processes, too: this began a session


def main(descriptor: int) -> None:
    """Answer requests until standard input ends, or report the error that ended this process."""
    os.set_inheritable(descriptor, False)
    answers = os.fdopen(descriptor, "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        _serve(answers)
    except Exception as error:
        print(json.dumps({"failure": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        raise


def _serve(answers: TextIO) -> None:
    settings = json.loads(sys.stdin.readline())
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, Path(settings["folder"])), daemon=True).start()
    engine = Engine(settings)
    print(json.dumps({"max_length": engine.max_length}), file=answers, flush=True)
    while True:
        engine.run(json.loads(requests.get()), answers)


if __name__ == "__main__":
    main(int(sys.argv[1]))
