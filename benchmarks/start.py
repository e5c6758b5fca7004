"""What is a solved start worth? `python -m benchmarks.start` after `eyas run hidden-states`.

Drafts from several first weights are trained with the same data, steps and batches, measured on the
held-out split before the first step and at intervals, and decode the same held-out prompts at the
end. `unscaled` is the random start of earlier versions: aux channels of their own sizes.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from rich.console import Console

from benchmarks.acceptance import Decoded, with_interval
from benchmarks.machine import describe
from deployments.recipe import Recipe, load_recipe
from eagle_core.closed_form.state_sizes import StateSizes
from eagle_core.draft.model import DraftModel
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import decode_prompts
from eagle_core.evaluation.prompts import Prompt, sample_prompts
from eagle_core.samples import SampleSource
from eagle_core.target.model import TargetModel
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import CLOSED_FORM, RANDOM
from eagle_core.training.trainer import train
from flows.bridge.draft_setup import choose_vocabulary, set_up_draft
from flows.bridge.first_weights import as_begun, first_weights
from flows.bridge.stored_source import StoredSource
from flows.workspace import Workspace
from storage.records.snapshot import Snapshot
from storage.store import Store

UNSCALED = "unscaled"
ARMS = [f"{CLOSED_FORM},adamw,3e-4", f"{RANDOM},adamw,1e-3", f"{UNSCALED},adamw,3e-3"]
REPORT = """\
`python -m benchmarks.start`: {machine}, {threads} thread(s).

{target} on {samples} samples ({tokens:,} tokens), steps of {batch_tokens} tokens, TTT length {ttt},
draft vocabulary {vocabulary}; {seeds} seeds; {prompts} held-out prompts, {new_tokens} new tokens
each, greedy, {draft_tokens} drafted per round.

| start, optimizer, rate | {marks} | decoding after {steps} steps (95 %) | against {first} |
|---{columns}|---|---|
{rows}

By steps: held-out length from joint prefixes, and accuracy at the first and the last TTT step;
means over the seeds. Decoding: tokens per verifying forward, differences paired by prompt. Solving
took {seconds:.0f} s on {pass_tokens:,} tokens.
"""


@dataclass(kw_only=True)
class Recorded:
    """A tracker that keeps held-out figures by step."""

    by_step: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Keep the held-out figures."""
        prefix = "held_out/"
        named = {
            name.removeprefix(prefix): value
            for name, value in scalars.items()
            if name.startswith(prefix)
        }
        self.by_step[step].update(named)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all arms share."""

    recipe: Recipe
    target: TargetModel
    tokens: TokenFile
    source: SampleSource
    held_out: SampleSource
    prompts: Sequence[Prompt]
    evaluation: EvaluationConfig
    steps: int
    every: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The seeds of one arm."""

    decoded: Decoded
    by_step: Mapping[int, Sequence[Mapping[str, float]]]
    seconds: float
    """Of the first weights, mean."""
    pass_tokens: int


def main() -> None:
    """Print the table and write it to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path("eyas-data"))
    parser.add_argument("--arms", nargs="+", default=ARMS, help="start,optimizer,rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--every", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], help="override a recipe key")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    space = Workspace(home=arguments.home, target=recipe.target.name, dataset=recipe.dataset.name)
    store = Store.open(str(space.store_root))
    (train_path,) = space.tokens_path.glob("train-*.arrow")
    (held_out_path,) = space.tokens_path.glob("held_out-*.arrow")
    tokens, held_out = TokenFile(train_path), TokenFile(held_out_path)
    evaluation = EvaluationConfig(
        num_prompts=arguments.prompts,
        num_plain_prompts=0,
        max_new_tokens=arguments.max_new_tokens,
        batch_prompts=8,
    )
    experiment = Experiment(
        recipe=recipe,
        target=TargetModel.load(recipe.target),
        tokens=tokens,
        source=_source(store, tokens),
        held_out=_source(store, held_out),
        prompts=sample_prompts(
            held_out,
            num_prompts=arguments.prompts,
            max_tokens=recipe.evaluation.max_prompt_tokens,
            max_turns=20,
        ),
        evaluation=evaluation,
        steps=arguments.steps,
        every=arguments.every,
    )
    console = Console(width=240)
    outcomes: dict[str, Outcome] = {}
    for arm in arguments.arms:
        outcomes[arm] = _trained(experiment, arm, num_seeds=arguments.seeds)
        console.print(_row(arm, outcomes), markup=False)
    first = next(iter(outcomes.values()))
    marks = [f"{step} steps" for step in sorted(first.by_step)]
    report = REPORT.format(
        machine=describe(["torch", "transformers"]),
        threads=torch.get_num_threads(),
        target=recipe.target.name,
        samples=len(tokens),
        tokens=int(tokens.lengths.sum()),
        batch_tokens=recipe.training.batch_tokens,
        ttt=recipe.training.ttt_length,
        vocabulary=recipe.training.draft_vocab_size,
        seeds=arguments.seeds,
        prompts=len(experiment.prompts),
        new_tokens=arguments.max_new_tokens,
        draft_tokens=evaluation.draft_tokens,
        steps=arguments.steps,
        marks=" | ".join(marks),
        columns="|---" * len(marks),
        first=arguments.arms[0],
        rows="\n".join(_row(arm, outcomes) for arm in outcomes),
        seconds=first.seconds,
        pass_tokens=first.pass_tokens,
    )
    console.print(report, markup=False)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


def _source(store: Store, tokens: TokenFile) -> StoredSource:
    return StoredSource(store.reader(Snapshot.of(tokens.sample_ids, store.commits())), None)


def _trained(experiment: Experiment, arm: str, *, num_seeds: int) -> Outcome:
    """Train one draft per seed and decode all prompts with each."""
    start, optimizer, rate = arm.split(",")
    target = experiment.target
    stop_ids = conversation_tokenizer(target.config).stop_ids
    gained, rounds, lengths, seconds = [], [], [], []
    by_step: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    pass_tokens = 0
    for seed in range(num_seeds):
        config = experiment.recipe.training.model_copy(
            update={
                "seed": seed,
                "start": RANDOM if start == UNSCALED else start,
                "optimizer": optimizer,
                "learning_rate": float(rate),
                "max_steps": experiment.steps,
                "held_out_every": experiment.every,
            }
        )
        recorded = Recorded()
        with tempfile.TemporaryDirectory() as folder, _channels(scaled=start != UNSCALED):
            run_path = Path(folder)
            choose_vocabulary(experiment.recipe.target, config, experiment.tokens, run_path)
            setup = set_up_draft(experiment.recipe.target, config, run_path)
            begun = first_weights(setup, experiment.source, experiment.held_out, config)
            assert begun is not None
            assert not begun.refused, begun.refused
            recorded.log(begun.scalars(), step=0)
            seconds.append(begun.seconds)
            pass_tokens = begun.num_tokens
            trained = train(
                config=as_begun(config, run_path),
                draft=setup.draft,
                target_lm_head=setup.target_lm_head,
                source=experiment.source,
                held_out=experiment.held_out,
                run_path=run_path,
                tracker=recorded,
            )
        results = decode_prompts(
            target, setup.draft, experiment.prompts, experiment.evaluation, stop_ids=stop_ids
        )
        traces = [result.speculative for result in results]
        gained.append([sum(each.gained for each in trace.rounds) for trace in traces])
        rounds.append([len(trace.rounds) for trace in traces])
        lengths.append([trained.figures.held_out_length] * 2)
        for step, figures in recorded.by_step.items():
            if figures or step == 0:
                by_step[step].append(figures)
    return Outcome(
        decoded=Decoded(
            gained=np.array(gained), rounds=np.array(rounds), held_out=np.array(lengths)
        ),
        by_step=by_step,
        seconds=float(np.mean(seconds)),
        pass_tokens=pass_tokens,
    )


@contextmanager
def _channels(*, scaled: bool) -> Iterator[None]:
    """Leave the aux channels as they are in the block, unless they are to be scaled."""

    def sizes(draft: DraftModel, *_: object) -> StateSizes:
        return StateSizes(aux_scale=torch.ones_like(draft.aux_scale), final_gain=torch.ones(0))

    if scaled:
        yield
        return
    with mock.patch("flows.bridge.first_weights.measure_state_sizes", sizes):
        yield


def _row(arm: str, outcomes: Mapping[str, Outcome]) -> str:
    found, (first, reference) = outcomes[arm], next(iter(outcomes.items()))
    every = np.arange(found.decoded.gained.shape[1])
    length = with_interval(found.decoded.length(every), found.decoded.interval, "{:.3f}")
    difference = ""
    if arm != first:
        shift = found.decoded.length(every) - reference.decoded.length(every)
        difference = with_interval(
            shift, lambda: found.decoded.interval(reference.decoded), "{:+.3f}"
        )
    marks = " | ".join(_figures(found.by_step[step]) for step in sorted(found.by_step))
    return f"| {arm.replace(',', ', ')} | {marks} | {length} | {difference} |"


def _figures(seeds: Sequence[Mapping[str, float]]) -> str:
    """Return the held-out figures after some steps, means over the seeds."""
    if not seeds or not seeds[0]:
        return "1.00"
    mean = {name: float(np.mean([one[name] for one in seeds])) for name in seeds[0]}
    last = max(int(name.removeprefix("accuracy_")) for name in mean if "accuracy" in name)
    first_and_last = f"{mean['accuracy_0']:.1%}, {mean[f'accuracy_{last}']:.1%}"
    return f"{mean['acceptance_length']:.3f} ({first_and_last})"


if __name__ == "__main__":
    main()
