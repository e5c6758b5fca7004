"""Does storage cost acceptance? `python -m benchmarks.acceptance` after `eyas run hidden-states`.

The states of a lossless store are encoded again under every profile; drafts trained from each, with
the same data, seeds and steps, decode the same held-out prompts. `online` trains while the target
computes. Intervals are 95 %, by bootstrap over prompts; seeds of a prompt are drawn together.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.machine import describe
from deployments.recipe import Recipe, load_recipe
from eagle_core.evaluation import EvaluationConfig, decode_prompts
from eagle_core.prompts import Prompt, sample_prompts
from eagle_core.samples import SampleSource
from eagle_core.target import TargetModel
from eagle_core.tokens import TokenFile
from eagle_core.trackers import NoTracker
from eagle_core.trainer import train
from eagle_core.training_config import TrainingConfig
from flows.draft_setup import set_up_draft
from flows.online_source import OnlineSource
from flows.stored_source import StoredSource
from flows.workspace import Workspace
from storage.plan import PlannedShard
from storage.samples import StoredSample
from storage.snapshot import Snapshot
from storage.store import Store

RESAMPLES = 2000
INTERVAL = (0.025, 0.975)
LOSSLESS = "lossless"
ONLINE = "online"
REPORT = """\
# Does storage cost acceptance?

`python -m benchmarks.acceptance`: {machine}, {threads} thread(s).

{target} on {samples} samples ({tokens:,} tokens), {steps} steps of {batch_tokens} tokens, TTT
length {ttt}, draft vocabulary {vocabulary}; {seeds} seeds; {prompts} held-out prompts,
{new_tokens} new tokens each, greedy, {draft_tokens} drafted a round.

| states | bytes a token | acceptance length (95 %) | against lossless (95 %) | by seed |
|---|---|---|---|---|
{rows}

Acceptance length is tokens per verifying forward of the target, 1 to {most}. The difference is
paired: both drafts decoded the same prompts.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What drafts trained from one kind of states accepted."""

    gained: NDArray[np.int64]
    """[seeds, prompts] tokens that verifying forwards gave."""
    rounds: NDArray[np.int64]
    """[seeds, prompts] verifying forwards."""

    def length(self, prompts: NDArray[np.int64]) -> float:
        """Return the acceptance length over these prompts and all seeds."""
        return float(self.gained[:, prompts].sum() / self.rounds[:, prompts].sum())

    def interval(self, other: "Decoded | None" = None) -> tuple[float, float]:
        """Return the 95 % interval of the length, or of its difference from another's."""
        rng = np.random.default_rng(0)
        count = self.gained.shape[1]
        found = []
        for _ in range(RESAMPLES):
            drawn = rng.integers(0, count, size=(count,))
            found.append(self.length(drawn) - (other.length(drawn) if other else 0.0))
        low, high = np.quantile(found, INTERVAL)
        return float(low), float(high)


def main() -> None:
    """Print the table, and write it where `--results` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path("eyas-data"))
    parser.add_argument("--states", nargs="+", default=[LOSSLESS, "int8", "int6", ONLINE])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], help="of the recipe")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    space = Workspace(home=arguments.home, target=recipe.target.name, dataset=recipe.dataset.name)
    origin = Store.open(str(space.store_root))
    assert origin.identity.profile == LOSSLESS, "states that were rounded once cannot be compared"
    (train_path,) = space.tokens_path.glob("train-*.arrow")
    (held_out_path,) = space.tokens_path.glob("held_out-*.arrow")
    tokens = TokenFile(train_path)
    evaluation = EvaluationConfig(
        num_prompts=arguments.prompts,
        num_plain_prompts=0,
        max_new_tokens=arguments.max_new_tokens,
        batch_prompts=8,
    )
    prompts = sample_prompts(
        TokenFile(held_out_path),
        num_prompts=arguments.prompts,
        max_tokens=recipe.evaluation.max_prompt_tokens,
        max_turns=20,
    )
    if not prompts:
        parser.error("no held-out prompt is short enough: make states of more conversations")
    target = TargetModel.load(recipe.target)
    training = recipe.training.model_copy(update={"max_steps": arguments.steps})
    console = Console(width=200)
    decoded: dict[str, Decoded] = {}
    costs: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.states:
            if kind == ONLINE:
                source, costs[kind] = _online(recipe, target, tokens), "none stored"
            else:
                source, costs[kind] = _stored(origin, kind, tokens, Path(folder))
            decoded[kind] = _trained(
                recipe, training, source, target, tokens, prompts, evaluation, arguments.seeds
            )
            console.print(_row(kind, decoded, costs), markup=False)
    report = REPORT.format(
        machine=describe(["torch", "transformers"]),
        threads=torch.get_num_threads(),
        target=recipe.target.name,
        samples=len(tokens),
        tokens=int(tokens.lengths.sum()),
        steps=arguments.steps,
        batch_tokens=training.batch_tokens,
        ttt=training.ttt_length,
        vocabulary=training.draft_vocab_size,
        seeds=arguments.seeds,
        prompts=len(prompts),
        new_tokens=arguments.max_new_tokens,
        draft_tokens=evaluation.draft_tokens,
        most=evaluation.draft_tokens + 1,
        rows="\n".join(_row(kind, decoded, costs) for kind in decoded),
    )
    console.print(report, markup=False)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


def _stored(
    origin: Store, profile: str, tokens: TokenFile, folder: Path
) -> tuple[SampleSource, str]:
    """Return the training samples from a store of `profile` with the shards of `origin`."""
    store = Store.create(str(folder / profile), replace(origin.identity, profile=profile))
    commits = origin.commits()
    for shard_id, commit in commits.items():
        reader = origin.reader(Snapshot.of(commit.sample_ids, {shard_id: commit}))
        samples: list[StoredSample] = [reader.fetch(row) for row in range(len(reader))]
        num_tokens = sum(len(sample) for sample in samples)
        shard = PlannedShard(shard_id=shard_id, sample_ids=commit.sample_ids, num_tokens=num_tokens)
        store.write_shard(shard, samples, probe=commit.probe)
    made = store.commits()
    per_token = sum(commit.stored_bytes for commit in made.values()) / sum(
        commit.num_tokens for commit in made.values()
    )
    reader = store.reader(Snapshot.of(tokens.sample_ids, made))
    return StoredSource(reader, None), f"{per_token:,.0f}"


def _online(recipe: Recipe, target: TargetModel, tokens: TokenFile) -> SampleSource:
    return OnlineSource(
        lambda: target,
        tokens,
        group_tokens=recipe.store.shard_tokens,
        groups_kept=recipe.training.shuffle_window,
        target_fingerprint=recipe.target.name,
    )


def _trained(
    recipe: Recipe,
    training: TrainingConfig,
    source: SampleSource,
    target: TargetModel,
    tokens: TokenFile,
    prompts: Sequence[Prompt],
    evaluation: EvaluationConfig,
    num_seeds: int,
) -> Decoded:
    """Train a draft for every seed from `source` and decode all prompts with each."""
    gained, rounds = [], []
    for seed in range(num_seeds):
        run_path = Path(tempfile.mkdtemp())
        config = training.model_copy(update={"seed": seed})
        setup = set_up_draft(recipe.target, config, tokens, run_path)
        train(
            config=config,
            draft=setup.draft,
            target_lm_head=setup.target_lm_head,
            source=source,
            held_out=None,
            run_path=run_path,
            tracker=NoTracker(),
        )
        results = decode_prompts(target, setup.draft, prompts, evaluation, stop_ids=target.stop_ids)
        traces = [result.speculative for result in results]
        gained.append([sum(each.gained for each in trace.rounds) for trace in traces])
        rounds.append([len(trace.rounds) for trace in traces])
        shutil.rmtree(run_path)
    return Decoded(gained=np.array(gained), rounds=np.array(rounds))


def _row(kind: str, decoded: dict[str, Decoded], costs: dict[str, str]) -> str:
    found, reference = decoded[kind], decoded.get(LOSSLESS)
    every = np.arange(found.gained.shape[1])
    by_seed = ", ".join(f"{length:.3f}" for length in found.gained.sum(1) / found.rounds.sum(1))
    less = ""
    if reference is not None and kind != LOSSLESS:
        shift = found.length(every) - reference.length(every)
        less = _with_interval(shift, lambda: found.interval(reference), "{:+.3f}")
    length = _with_interval(found.length(every), found.interval, "{:.3f}")
    return f"| {kind} | {costs[kind]} | {length} | {less} | {by_seed} |"


def _with_interval(value: float, interval: Callable[[], tuple[float, float]], form: str) -> str:
    low, high = (form.format(end) for end in interval())
    return f"{form.format(value)} ({low} to {high})"


if __name__ == "__main__":
    main()
