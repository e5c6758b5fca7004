"""What is a solved start worth? `python -m benchmarks.start` after `eyas run hidden-states`.

Drafts from several first weights are trained with the same data, steps and batches, measured on the
held-out split before the first step and after some, and decode the same held-out prompts at the
end. All runs are kept below `--work`: what ended is not run again, and what was interrupted goes
on, so that seeds can be measured at different times, or by several processes. The arm `speculators`
is trained by that package from its own first weights, on the same batches.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.acceptance import Decoded, with_interval
from benchmarks.machine import describe
from benchmarks.start_arm import UNSCALED, Arm, Experiment, RunRecord, run_arm
from deployments.recipe import load_recipe
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.prompts import sample_prompts
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import for_decoding
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import CLOSED_FORM, RANDOM
from flows.bridge.stored_source import StoredSource
from flows.workspace import Workspace
from storage.records.snapshot import Snapshot
from storage.store import Store

ARMS = [CLOSED_FORM, RANDOM, f"{RANDOM},{UNSCALED}"]
REPORT = """\
`python -m benchmarks.start`: {machine}, {threads} thread(s).

{target} on {samples} samples ({tokens:,} tokens), steps of {batch_tokens} tokens, TTT length {ttt},
draft vocabulary {vocabulary}; seeds {seeds}; {prompts} held-out prompts, {new_tokens} new tokens
each, greedy, {draft_tokens} drafted per round.

| first weights | {marks} | decoding after {steps} steps (95 %) | against {first} |
|---{columns}|---|---|
{rows}

By steps: held-out length from joint prefixes; means over the seeds, and their range. Decoding:
tokens per verifying forward, differences paired by prompt. Solving took {seconds:.0f} s on
{pass_tokens:,} tokens.

| first weights | accuracy by TTT step before training | after {steps} steps |
|---|---|---|
{accuracies}
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The seeds of one arm."""

    name: str
    runs: Sequence[RunRecord]

    @property
    def decoded(self) -> Decoded:
        """All prompts with all seeds."""
        return Decoded(
            gained=np.array([run.gained for run in self.runs]),
            rounds=np.array([run.rounds for run in self.runs]),
            held_out=np.zeros((len(self.runs), 2)),
        )

    def row(self, first: "Outcome") -> str:
        """Return its row of the table of lengths."""
        every = np.arange(self.decoded.gained.shape[1])
        length = with_interval(self.decoded.length(every), self.decoded.interval, "{:.3f}")
        difference = ""
        if self.name != first.name:
            shift = self.decoded.length(every) - first.decoded.length(every)
            difference = with_interval(
                shift, lambda: self.decoded.interval(first.decoded), "{:+.3f}"
            )
        marks = " | ".join(self._length(step) for step in sorted(self.runs[0].by_step))
        return f"| {self.name} | {marks} | {length} | {difference} |"

    def accuracies(self) -> str:
        """Return its row of the table of accuracies."""
        ends = (0, max(self.runs[0].by_step))
        shown = " | ".join(self._accuracies(step) for step in ends)
        return f"| {self.name} | {shown} |"

    def _length(self, step: int) -> str:
        lengths = [run.by_step[step].length for run in self.runs]
        mean = f"{np.mean(lengths):.3f}"
        return mean if len(lengths) == 1 else f"{mean} ({min(lengths):.3f}-{max(lengths):.3f})"

    def _accuracies(self, step: int) -> str:
        means = np.mean([run.by_step[step].accuracies for run in self.runs], axis=0)
        return " ".join(f"{mean:.1%}" for mean in means)


def main() -> None:
    """Print the tables and write them to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path("eyas-data"))
    parser.add_argument("--work", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="START[,unscaled][,KEY=VALUE...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--marks", type=int, nargs="*", default=[60, 120, 500])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], help="override a recipe key")
    parser.add_argument("--speculators-venv", type=Path, help="needed for the arm speculators")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    experiment = _experiment(arguments)
    console = Console(width=240)
    outcomes: list[Outcome] = []
    for name in arguments.arms:
        arm, runs = Arm.parse(name), []
        for seed in arguments.seeds:
            folder = arguments.work / f"{name}-{arguments.steps}-{seed}"
            runs.append(run_arm(experiment, arm, seed, folder))
        outcomes.append(Outcome(name=name.replace(",", ", "), runs=runs))
        console.print(outcomes[-1].row(outcomes[0]), markup=False)
    report = _report(experiment, outcomes, arguments.seeds)
    console.print(report, markup=False)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


def _experiment(arguments: argparse.Namespace) -> Experiment:
    recipe = load_recipe(arguments.recipe, arguments.set)
    space = Workspace(home=arguments.home, target=recipe.target.name, dataset=recipe.dataset.name)
    store = Store.open(str(space.store_root))
    tokens, held_out = (
        TokenFile(
            max(space.tokens_path.glob(f"{split}-*.arrow"), key=lambda path: path.stat().st_mtime)
        )
        for split in ("train", "held_out")
    )
    return Experiment(
        recipe=recipe,
        target=TargetModel.load(for_decoding(recipe.target)),
        tokens=tokens,
        source=_source(store, tokens),
        held_out=_source(store, held_out),
        prompts=sample_prompts(
            held_out,
            num_prompts=arguments.prompts,
            max_tokens=recipe.evaluation.max_prompt_tokens,
            max_turns=20,
        ),
        evaluation=EvaluationConfig(
            num_prompts=arguments.prompts,
            num_plain_prompts=0,
            max_new_tokens=arguments.max_new_tokens,
            batch_prompts=8,
        ),
        steps=arguments.steps,
        marks=arguments.marks,
        speculators_python=arguments.speculators_venv and _python_of(arguments.speculators_venv),
    )


def _python_of(environment: Path) -> Path:
    return environment.resolve() / "bin" / "python"


def _source(store: Store, tokens: TokenFile) -> StoredSource:
    commits = store.commits()
    return StoredSource(store.reader(Snapshot.of(commits.usable(tokens.sample_ids), commits)), None)


def _report(experiment: Experiment, outcomes: Sequence[Outcome], seeds: Sequence[int]) -> str:
    first, training = outcomes[0], experiment.recipe.training
    steps = sorted(first.runs[0].by_step)
    marks = [f"{step} steps" for step in steps]
    return REPORT.format(
        machine=describe(["torch", "transformers"]),
        threads=torch.get_num_threads(),
        target=experiment.recipe.target.name,
        samples=len(experiment.tokens),
        tokens=int(experiment.tokens.lengths.sum()),
        batch_tokens=training.batch_tokens,
        ttt=training.ttt_length,
        vocabulary=training.draft_vocab_size,
        seeds=", ".join(map(str, seeds)),
        prompts=len(experiment.prompts),
        new_tokens=experiment.evaluation.max_new_tokens,
        draft_tokens=experiment.evaluation.draft_tokens,
        steps=experiment.steps,
        marks=" | ".join(marks),
        columns="|---" * len(marks),
        first=first.name,
        rows="\n".join(outcome.row(first) for outcome in outcomes),
        seconds=np.mean([run.start_seconds for run in first.runs]),
        pass_tokens=first.runs[0].start_tokens,
        accuracies="\n".join(outcome.accuracies() for outcome in outcomes),
    )


if __name__ == "__main__":
    main()
