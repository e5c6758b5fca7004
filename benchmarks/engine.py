"""A draft in a real engine: `python -m benchmarks.engine smollm2 --server http://127.0.0.1:8000`.

First start vLLM with the command that `eyas run export` prints. It gets prompts as token ids, one
by one, decodes greedily, and counts what it accepts. Eyas decodes the same prompts with the same
draft in this process. If an engine reads an export differently from how it was trained (another
layer, norm, rotation or token map), acceptance is lower, without any error. With `--split train`
the prompts are those that the draft has learned, so more is accepted and a loss is larger.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.machine import describe
from deployments.recipe import load_recipe
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import decode_prompts
from eagle_core.evaluation.prompts import Prompt, sample_prompts
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import for_decoding
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.draft_setup import set_up_draft
from flows.tasks.trained_run import choose_checkpoint, load_checkpoint
from flows.workspace import Workspace

ROUNDS = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
TIMEOUT_SECONDS = 600.0
REPORT = """\
# The draft in a real engine

`python -m benchmarks.engine`: {machine}.

{engine}, {target} in {dtype} with the draft of run {run}, step {step}. {prompts} prompts of split
{split}, at most {new_tokens} new tokens each, greedy, {draft_tokens} drafted per round.

| decoded by | rounds | acceptance length | accepted to depth {depths} | texts equal to Eyas's |
|---|---|---|{lines}---|
{rows}

vLLM also counts tokens accepted after a stop token; Eyas ends with it.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Acceptance counts of a decoder."""

    rounds: int
    """Verifying forwards."""
    accepted: NDArray[np.int64]
    """[K] rounds in which the drafted tokens up to each depth were all accepted."""

    @property
    def length(self) -> float:
        """Tokens per verifying forward."""
        return 1 + float(self.accepted.sum()) / self.rounds

    def row(self, name: str, equal: str) -> str:
        """Return a row of the table."""
        shares = " | ".join(f"{share:.1%}" for share in self.accepted / self.rounds)
        return f"| {name} | {self.rounds} | {self.length:.3f} | {shares} | {equal} |"


def main() -> None:
    """Print the table and write it to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--server", required=True, help="address of vLLM, without /v1")
    parser.add_argument("--home", type=Path, default=Path("eyas-data"))
    parser.add_argument("--run", default="main")
    parser.add_argument("--split", choices=["held_out", "train"], default="held_out")
    parser.add_argument("--checkpoint", choices=["best", "newest"], default="best")
    parser.add_argument("--set", action="append", default=[], help="override a recipe key")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    space = Workspace(home=arguments.home, target=recipe.target.name, dataset=recipe.dataset.name)
    (train_path,) = space.tokens_path.glob("train-*.arrow")
    (held_out_path,) = space.tokens_path.glob("held_out-*.arrow")
    config = recipe.evaluation.model_copy(update={"num_plain_prompts": 0, "temperature": 0.0})
    prompts = sample_prompts(
        TokenFile(train_path if arguments.split == "train" else held_out_path),
        num_prompts=config.num_prompts,
        max_tokens=config.max_prompt_tokens,
    )
    theirs, their_texts = from_engine(arguments.server, prompts, config)

    run_path = space.run_path(arguments.run)
    setup = set_up_draft(recipe.target, recipe.training, run_path)
    step = load_checkpoint(setup, choose_checkpoint(run_path, arguments.checkpoint)).step
    target = TargetModel.load(for_decoding(recipe.target))
    stop_ids = conversation_tokenizer(recipe.target).stop_ids
    decoded = decode_prompts(target, setup.draft, prompts, config, stop_ids=stop_ids)
    traces = [result.speculative for result in decoded]
    rounds = [verification for trace in traces for verification in trace.rounds]
    depths = np.arange(1, config.draft_tokens + 1)
    ours = Counted(
        rounds=len(rounds),
        accepted=np.array([sum(r.accepted >= depth for r in rounds) for depth in depths]),
    )
    equal = sum(trace.tokens == tokens for trace, tokens in zip(traces, their_texts, strict=True))
    version = httpx.get(f"{arguments.server}/version", timeout=TIMEOUT_SECONDS).json()["version"]
    report = REPORT.format(
        machine=describe(["torch", "transformers"]),
        engine=f"vLLM {version}",
        target=recipe.target.name,
        dtype=target.config.dtype,
        split=arguments.split,
        run=arguments.run,
        step=step,
        prompts=len(prompts),
        new_tokens=config.max_new_tokens,
        draft_tokens=config.draft_tokens,
        depths=" | ".join(str(depth) for depth in depths),
        lines="---|" * config.draft_tokens,
        rows="\n".join(
            [
                ours.row("Eyas", ""),
                theirs.row(f"vLLM {version}", f"{equal} of {len(prompts)}"),
            ]
        ),
    )
    Console(width=200).print(report, markup=False)
    if arguments.results is not None:
        arguments.results.write_text(report, encoding="utf-8")


def from_engine(
    server: str, prompts: Sequence[Prompt], config: EvaluationConfig
) -> tuple[Counted, list[tuple[int, ...]]]:
    """Return vLLM's acceptance counts and texts."""
    texts = []
    with httpx.Client(base_url=server, timeout=TIMEOUT_SECONDS) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        before = _counters(client, config.draft_tokens)
        for prompt in prompts:
            answer = client.post(
                "/v1/completions",
                json={
                    "model": model,
                    "prompt": list(prompt.input_ids),
                    "max_tokens": config.max_new_tokens,
                    "temperature": 0.0,
                    "return_token_ids": True,
                },
            ).raise_for_status()
            texts.append(tuple(answer.json()["choices"][0]["token_ids"]))
        after = _counters(client, config.draft_tokens)
    found = Counted(rounds=after.rounds - before.rounds, accepted=after.accepted - before.accepted)
    if found.rounds == 0:
        raise SystemExit(
            f"{server} decoded without a draft; start it with the command of `eyas run export`"
        )
    return found, texts


def _counters(client: httpx.Client, draft_tokens: int) -> Counted:
    text = client.get("/metrics").raise_for_status().text
    rounds, accepted = 0, np.zeros(draft_tokens, dtype=np.int64)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == ROUNDS:
                rounds += int(sample.value)
            elif sample.name == ACCEPTED:
                accepted[int(sample.labels["position"])] += int(sample.value)
    return Counted(rounds=rounds, accepted=accepted)


if __name__ == "__main__":
    main()
