"""Speculative decoding against plain decoding: `python -m benchmarks.greedy_equality`.

Greedy texts of held-out prompts must be equal token for token, one by one and in batches, with
SmolLM2 in float32. Where two logits nearly tie, rounding may decide; the margin is reported.
Prompts are the user's side of held-out ShareGPT conversations; the draft is the newest checkpoint
of a run below `--home`, or an untrained one.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.machine import describe
from deployments.recipe import Recipe, load_recipe
from eagle_core.decoding.chain_drafter import DraftNetwork
from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import generate_plain_batch, generate_speculative_batch
from eagle_core.decoding.trace import GenerationTrace
from eagle_core.evaluation.decode_prompts import mismatch_margin
from eagle_core.evaluation.prompts import sample_prompts
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import for_decoding
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.checkpoint import newest
from flows.bridge.draft_setup import choose_vocabulary, load_trained, set_up_draft
from flows.workspace import Workspace

REPORT = """\
# Speculative decoding equals plain decoding

`python -m benchmarks.greedy_equality`: {machine}, {threads} thread(s).

{prompts} held-out prompts of at most {max_tokens} tokens, {new_tokens} new tokens each,
SmolLM2-135M in float32, greedy, {draft_tokens} drafted tokens per round, {draft} draft.
Reference: plain decoding, one by one.

| decoded | equal texts | largest logit margin where texts differ | tokens/s |
|---|---|---|---|
{rows}
"""


def main() -> None:
    """Print the table and write it to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path("eyas-data"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    space = Workspace(home=arguments.home, target=recipe.target.name, dataset=recipe.dataset.name)
    prompts = _prompts(space, arguments.prompts, arguments.max_prompt_tokens)
    target = TargetModel.load(for_decoding(recipe.target))
    draft, kind = _draft(recipe, space)
    config = DecodingConfig(max_new_tokens=arguments.max_new_tokens)
    batch = arguments.batch
    stop_ids = conversation_tokenizer(recipe.target).stop_ids

    def plainly(some: Sequence[Sequence[int]]) -> list[GenerationTrace]:
        return generate_plain_batch(target, some, config, stop_ids)

    def speculatively(some: Sequence[Sequence[int]]) -> list[GenerationTrace]:
        return generate_speculative_batch(target, draft, some, config, stop_ids)

    console = Console(width=200)
    plainly(prompts[:1])  # warm-up
    expected, seconds = _decoded(plainly, prompts, 1)
    rows = [f"| plainly, one by one | | | {_rate(expected, seconds)} |"]
    for name, decode, size in (
        (f"plainly, {batch} at a time", plainly, batch),
        ("speculatively, one by one", speculatively, 1),
        (f"speculatively, {batch} at a time", speculatively, batch),
    ):
        found, seconds = _decoded(decode, prompts, size)
        margins = [
            mismatch_margin(target, prompt, left, right)
            for prompt, left, right in zip(prompts, expected, found, strict=True)
            if left != right
        ]
        largest = f"{max(margins):.1e}" if margins else ""
        equal = f"{len(prompts) - len(margins)} of {len(prompts)}"
        rows.append(f"| {name} | {equal} | {largest} | {_rate(found, seconds)} |")
        console.print(rows[-1], markup=False)
    report = REPORT.format(
        machine=describe(["torch", "transformers"]),
        threads=torch.get_num_threads(),
        prompts=len(prompts),
        max_tokens=arguments.max_prompt_tokens,
        new_tokens=config.max_new_tokens,
        draft_tokens=config.draft_tokens,
        draft=kind,
        rows="\n".join(rows),
    )
    console.print(report, markup=False)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


def _prompts(space: Workspace, num_prompts: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Return prompts of all turns of the held-out split, then of the training split."""
    found: list[tuple[int, ...]] = []
    for split in ("held_out", "train"):
        (path,) = space.tokens_path.glob(f"{split}-*.arrow")
        prompts = sample_prompts(
            TokenFile(path), num_prompts=num_prompts, max_tokens=max_tokens, max_turns=20
        )
        found += [prompt.input_ids for prompt in prompts]
    return found[:num_prompts]


def _draft(recipe: Recipe, space: Workspace) -> tuple[DraftNetwork, str]:
    (path,) = space.tokens_path.glob("train-*.arrow")
    run_path = space.run_path("main")
    choose_vocabulary(recipe.target, recipe.training, TokenFile(path), run_path)
    setup = set_up_draft(recipe.target, recipe.training, run_path)
    if newest(run_path) is None:
        return setup.draft, "an untrained"
    return load_trained(setup), "a trained"


def _decoded(
    decode: Callable[[Sequence[Sequence[int]]], list[GenerationTrace]],
    prompts: Sequence[Sequence[int]],
    size: int,
) -> tuple[list[tuple[int, ...]], float]:
    """Return the texts of all prompts, decoded `size` at a time, and the seconds it took."""
    begun = time.perf_counter()
    texts = [
        trace.tokens
        for first in range(0, len(prompts), size)
        for trace in decode(prompts[first : first + size])
    ]
    return texts, time.perf_counter() - begun


def _rate(texts: Sequence[Sequence[int]], seconds: float) -> str:
    return f"{sum(map(len, texts)) / seconds:.1f}"


if __name__ == "__main__":
    main()
