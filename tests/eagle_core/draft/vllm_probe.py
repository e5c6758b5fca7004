"""Run by a Python that has vLLM: decodes greedily with exports and writes what was drafted.

It reads a line per export and writes a line per answer, until nobody asks any more.
"""

import gc
import json
import os
import sys
import traceback
from typing import Any, TextIO

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the drafter must be in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory


def main(answers: TextIO) -> None:
    """Write {"tokens": [prompts][..], "drafted": [prompts][rounds][K]} for each request.

    For one that does not load, {"error": ...}.
    """
    gc.freeze()  # else each collection looks at all that the imports made
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception:  # noqa: BLE001 (the other drafts go on)
            answer = {"error": traceback.format_exc()}
        cleanup_dist_env_and_memory()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    speculation = {
        "method": "eagle3",
        "model": request["draft"],
        "num_speculative_tokens": request["draft_tokens"],
    }
    llm = LLM(
        model=request["target"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=2,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        **({"speculative_config": speculation} if request["layout"] == "serving" else {}),
    )
    drafted: list[list[int]] = []
    _listen(_drafter(llm), drafted)
    settings = SamplingParams(
        temperature=0.0, max_tokens=request["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    answer: dict[str, Any] = {"tokens": [], "drafted": []}
    for prompt in request["prompts"]:
        drafted.clear()
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=prompt), settings, use_tqdm=False)
        answer["tokens"].append(list(output.outputs[0].token_ids))
        answer["drafted"].append(list(drafted))
    return answer


def _drafter(llm: LLM) -> Any:
    core: Any = llm.llm_engine.engine_core
    worker = core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.drafter


def _listen(drafter: Any, drafted: list[list[int]]) -> None:
    propose = drafter.propose

    def heard(*arguments: Any, **more: Any) -> Any:
        tokens = propose(*arguments, **more)
        drafted.extend(tokens.tolist())
        return tokens

    drafter.propose = heard


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as opened:
        main(opened)
