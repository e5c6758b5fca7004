"""Does storage cost acceptance? `python -m benchmarks.acceptance` after `eyas run hidden-states`.

The states of a lossless store are re-encoded with every profile; drafts trained from each, with the
same data, seeds and steps, decode the same held-out prompts. Intervals are 95 %, by bootstrap over
prompts; the seeds of a prompt are resampled together.

`PROFILE+recompute` states are captured again, as such a store requires; their omitted states are
recomputed once before training, as the loader would in each epoch. `online` trains while the target
computes, on the same samples in another order; with the same order, the tests show bit-identical
weights.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.machine import describe
from deployments.recipe import Recipe, load_recipe
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import decode_prompts
from eagle_core.evaluation.estimate import expected_length
from eagle_core.evaluation.prompts import Prompt, sample_prompts
from eagle_core.samples import HiddenStateSample, SampleSource
from eagle_core.target import weights
from eagle_core.target.capture import capture_states
from eagle_core.target.layerwise.recompute_model import RecomputeModel
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import for_decoding, read_model_config
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.tracking.tracker import NoTracker
from eagle_core.training.config import TrainingConfig
from eagle_core.training.trainer import train
from flows.bridge.draft_setup import choose_vocabulary, set_up_draft
from flows.bridge.first_weights import as_begun, first_weights
from flows.bridge.online_source import OnlineSource
from flows.bridge.recompute import load_recompute_model
from flows.bridge.store_identity import omitted_states
from flows.bridge.stored_source import StoredSource, to_stored
from flows.workspace import Workspace
from storage.profiles import ProfileName
from storage.records.identity import StoreIdentity
from storage.records.plan import PlannedShard
from storage.records.snapshot import Snapshot
from storage.store import Store

RESAMPLES = 2000
INTERVAL = (0.025, 0.975)
LOSSLESS = "lossless"
ONLINE = "online"
RECOMPUTE = "+recompute"
STATES = [
    LOSSLESS,
    "int8",
    "int6",
    "int4",
    LOSSLESS + RECOMPUTE,
    "int8" + RECOMPUTE,
    "int4" + RECOMPUTE,
    ONLINE,
]
REPORT = """\
# Does storage cost acceptance?

`python -m benchmarks.acceptance`: {machine}, {threads} thread(s).

{target} on {samples} samples ({tokens:,} tokens), {steps} steps of {batch_tokens} tokens, TTT
length {ttt}, draft vocabulary {vocabulary}; {seeds} seeds; {prompts} held-out prompts,
{new_tokens} new tokens each, greedy, {draft_tokens} drafted per round.

| states | bytes per token | acceptance length (95 %) | against lossless (95 %) | {more} |
|---|---|---|---|---|---|---|
{rows}

Acceptance length is tokens per verifying forward of the target, 1 to {most}. The difference is
paired: both drafts decoded the same prompts. "Held out" is a length from the trainer's own metrics
at the supervised positions of the held-out split, with {ttt} drafted tokens, always from the
lossless states: mean and range over the seeds. It is less noisy than decoding.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Acceptance of the drafts trained from one kind of states."""

    gained: NDArray[np.int64]
    """[seeds, prompts] tokens from verifying forwards."""
    rounds: NDArray[np.int64]
    """[seeds, prompts] verifying forwards."""
    held_out: NDArray[np.float64]
    """[seeds, 2] lengths by joint prefix and by total variation on the held-out split."""

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
    """Print the table and write it to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path("eyas-data"))
    parser.add_argument("--states", nargs="+", default=STATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], help="override a recipe key")
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
        parser.error("no held-out prompt is short enough; generate states of more conversations")
    target = TargetModel.load(for_decoding(recipe.target))
    training = recipe.training.model_copy(
        update={"max_steps": arguments.steps, "held_out_every": arguments.steps}
    )
    console = Console(width=200)
    decoded: dict[str, Decoded] = {}
    costs: dict[str, str] = {}
    experiment = Experiment(
        recipe=recipe,
        training=training,
        target=target,
        tokens=tokens,
        held_out=_source(origin, TokenFile(held_out_path)),
        prompts=prompts,
        evaluation=evaluation,
    )
    with tempfile.TemporaryDirectory() as folder:
        states = States(
            recipe=recipe, origin=origin, tokens=tokens, target=target, folder=Path(folder)
        )
        for kind in arguments.states:
            source, costs[kind] = states.source(kind)
            decoded[kind] = _trained(experiment, source, num_seeds=arguments.seeds)
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
        more="by seed | held out, joint prefix | held out, sampled",
        rows="\n".join(_row(kind, decoded, costs) for kind in decoded),
    )
    console.print(report, markup=False)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class States:
    """Provides the training samples of every kind, from the same tokens in the same shards."""

    recipe: Recipe
    origin: Store
    tokens: TokenFile
    target: TargetModel
    folder: Path

    def source(self, kind: str) -> tuple[SampleSource, str]:
        """Return the samples, and the bytes per token on disk."""
        if kind == ONLINE:
            return self._online(), "none stored"
        profile, recompute, _ = kind.partition(RECOMPUTE)
        identity = replace(self.origin.identity, profile=cast("ProfileName", profile))
        if not recompute:
            store = self._filled(kind, identity, _by_id(_source(self.origin, self.tokens)))
            return _source(store, self.tokens), _bytes_per_token(store)
        model_config = read_model_config(self.recipe.target, weights.locate(self.recipe.target))
        identity = replace(identity, omitted=omitted_states(self.recipe.target, model_config))
        store = self._filled(kind, identity, self._captured)
        recompute_model = load_recompute_model(self.recipe.target, identity)
        recomputed = _source(store, self.tokens, recompute_model)
        complete = self._filled(f"{kind}-complete", self.origin.identity, _by_id(recomputed))
        return _source(complete, self.tokens), _bytes_per_token(store)

    @cached_property
    def _captured(self) -> Mapping[str, HiddenStateSample]:
        samples = self.tokens.by_id(self.tokens.sample_ids)
        states = capture_states(self.target, samples, for_recompute=True)
        return {state.sample_id: state for state in states}

    def _filled(
        self, name: str, identity: StoreIdentity, states: Mapping[str, HiddenStateSample]
    ) -> Store:
        """Return a new store of these states, in shards like the origin's."""
        store = Store.create(str(self.folder / name), identity)
        for commit in self.origin.commits().values():
            samples = [to_stored(states[name]) for name in commit.sample_ids if name in states]
            if samples:  # else the whole shard is held out
                store.write_shard(PlannedShard.holding(samples), samples)
        return store

    def _online(self) -> SampleSource:
        return OnlineSource(
            lambda: self.target,
            self.tokens,
            group_tokens=self.recipe.store.shard_tokens,
            groups_kept=self.recipe.training.shuffle_window,
            target_fingerprint=self.recipe.target.name,
        )


def _source(
    store: Store, tokens: TokenFile, recompute_model: RecomputeModel | None = None
) -> StoredSource:
    """Return the samples of a token file from a store."""
    return StoredSource(
        store.reader(Snapshot.of(tokens.sample_ids, store.commits())), recompute_model
    )


def _by_id(source: StoredSource) -> Mapping[str, HiddenStateSample]:
    samples = (source.fetch(row) for row in range(len(source.lengths)))
    return {sample.sample_id: sample for sample in samples}


def _bytes_per_token(store: Store) -> str:
    commits = store.commits().values()
    num_bytes = sum(commit.stored_bytes for commit in commits)
    return f"{num_bytes / sum(commit.num_tokens for commit in commits):,.0f}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The settings that all kinds of states share."""

    recipe: Recipe
    training: TrainingConfig
    target: TargetModel
    tokens: TokenFile
    held_out: SampleSource
    prompts: Sequence[Prompt]
    evaluation: EvaluationConfig


def _trained(experiment: Experiment, source: SampleSource, *, num_seeds: int) -> Decoded:
    """Train one draft per seed from `source` and decode all prompts with each."""
    gained, rounds, held_out = [], [], []
    target = experiment.target
    for seed in range(num_seeds):
        run_path = Path(tempfile.mkdtemp())
        config = experiment.training.model_copy(update={"seed": seed})
        choose_vocabulary(experiment.recipe.target, config, experiment.tokens, run_path)
        setup = set_up_draft(experiment.recipe.target, config, run_path)
        first_weights(setup, source, experiment.held_out, config)
        trained = train(
            config=as_begun(config, run_path),
            draft=setup.draft,
            target_lm_head=setup.target_lm_head,
            source=source,
            held_out=experiment.held_out,
            run_path=run_path,
            tracker=NoTracker(),
        )
        stop_ids = conversation_tokenizer(target.config).stop_ids
        results = decode_prompts(
            target, setup.draft, experiment.prompts, experiment.evaluation, stop_ids=stop_ids
        )
        traces = [result.speculative for result in results]
        gained.append([sum(each.gained for each in trace.rounds) for trace in traces])
        rounds.append([len(trace.rounds) for trace in traces])
        metrics = trained.figures
        sampled = expected_length(np.array(metrics.held_out_acceptances))
        held_out.append([metrics.held_out_length, float(sampled)])
        shutil.rmtree(run_path)
    return Decoded(gained=np.array(gained), rounds=np.array(rounds), held_out=np.array(held_out))


def _row(kind: str, decoded: dict[str, Decoded], costs: dict[str, str]) -> str:
    found, reference = decoded[kind], decoded.get(LOSSLESS)
    every = np.arange(found.gained.shape[1])
    by_seed = ", ".join(f"{length:.3f}" for length in found.gained.sum(1) / found.rounds.sum(1))
    difference = ""
    if reference is not None and kind != LOSSLESS:
        shift = found.length(every) - reference.length(every)
        difference = with_interval(shift, lambda: found.interval(reference), "{:+.3f}")
    length = with_interval(found.length(every), found.interval, "{:.3f}")
    exact, sampled = (
        f"{lengths.mean():.4f} ({lengths.min():.4f} to {lengths.max():.4f})"
        for lengths in found.held_out.T
    )
    return f"| {kind} | {costs[kind]} | {length} | {difference} | {by_seed} | {exact} | {sampled} |"


def with_interval(value: float, interval: Callable[[], tuple[float, float]], form: str) -> str:
    """Return a value with its interval."""
    low, high = (form.format(end) for end in interval())
    return f"{form.format(value)} ({low} to {high})"


if __name__ == "__main__":
    main()
