"""One run of `benchmarks.start`: a draft trained from some first weights, measured and decoded.

A run is kept in its own folder. An interrupted one is resumed, and one that ended is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from benchmarks.start_speculators import train_speculators
from deployments.recipe import Recipe
from eagle_core.draft.model import DraftModel
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import decode_prompts
from eagle_core.evaluation.prompts import Prompt
from eagle_core.samples import SampleSource
from eagle_core.target.model import TargetModel
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.tracking.tracker import NoTracker
from eagle_core.training.config import RANDOM, TrainingConfig
from eagle_core.training.pieces import Windows
from eagle_core.training.precision import multiplying_dtype
from eagle_core.training.trainer import train
from eagle_core.training.validation import (
    HeldOutFigures,
    held_out_batches,
    measure,
    measuring_step,
)
from flows.bridge.draft_setup import DraftSetup, choose_vocabulary, set_up_draft
from flows.bridge.first_weights import as_begun, first_weights

UNSCALED = "unscaled"
SPECULATORS = "speculators"
"""The arm that the package trains (`benchmarks.start_peer`)."""
_RECORD_NAME = "figures.json"
_CHECKPOINT_EVERY = 200


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all runs share."""

    recipe: Recipe
    target: TargetModel
    tokens: TokenFile
    source: SampleSource
    held_out: SampleSource
    prompts: Sequence[Prompt]
    evaluation: EvaluationConfig
    steps: int
    marks: Sequence[int]
    """Steps after which the draft is measured."""
    speculators_python: Path | None


class Figures(BaseModel):
    """Held-out figures after some steps."""

    length: float
    accuracies: tuple[float, ...]


class RunRecord(BaseModel):
    """What one run gave."""

    start_seconds: float
    start_tokens: int
    by_step: dict[int, Figures] = Field(default_factory=dict)
    gained: list[int] = Field(default_factory=list)
    """By prompt, tokens from verifying forwards."""
    rounds: list[int] = Field(default_factory=list)
    """By prompt, verifying forwards."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """First weights and settings: `START[,unscaled][,KEY=VALUE...]`."""

    start: str
    is_scaled: bool
    """Whether training divides the channels of the aux states by their sizes."""
    settings: Mapping[str, str]
    """Keys of `training` that differ from the recipe's."""

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Return the arm of a command line."""
        start, *rest = text.split(",")
        settings = dict(part.split("=", 1) for part in rest if part != UNSCALED)
        return cls(start=start, is_scaled=UNSCALED not in rest, settings=settings)

    def training(self, experiment: Experiment, seed: int) -> TrainingConfig:
        """Return the settings of one of its runs."""
        given = experiment.recipe.training.model_dump(exclude_unset=True)
        own = {
            "start": RANDOM if self.start == SPECULATORS else self.start,
            "seed": seed,
            "max_steps": experiment.steps,
            "held_out_every": experiment.steps,
            "checkpoint_every": _CHECKPOINT_EVERY,
        }
        return TrainingConfig.model_validate({**given, **own, **self.settings}, strict=False)


def run_arm(experiment: Experiment, arm: Arm, seed: int, run_path: Path) -> RunRecord:
    """Train a draft, decode all prompts with it, and return what was measured."""
    record_path = run_path / _RECORD_NAME
    found = _read(record_path)
    if found is not None and found.gained:
        return found
    training = arm.training(experiment, seed)
    run_path.mkdir(parents=True, exist_ok=True)
    choose_vocabulary(experiment.recipe.target, training, experiment.tokens, run_path)
    setup = set_up_draft(experiment.recipe.target, training, run_path)
    if arm.start == SPECULATORS:
        record = RunRecord(start_seconds=0.0, start_tokens=0)
    else:  # an interrupted run may have no checkpoint yet
        begun = _begun(experiment, setup, training, is_scaled=arm.is_scaled)
        record = found or begun

    def keep(step: int) -> None:
        figures = _measured(experiment, setup, training)
        record.by_step[step] = Figures(length=figures.length, accuracies=figures.accuracies)
        record_path.write_text(record.model_dump_json(indent=1), encoding="utf-8")

    marks = {0, *experiment.marks, experiment.steps}
    if arm.start == SPECULATORS:
        assert experiment.speculators_python is not None, "--speculators-venv is needed"
        train_speculators(
            experiment.speculators_python,
            setup,
            training,
            experiment.source,
            num_steps=experiment.steps,
            marks=marks,
            on_mark=keep,
        )
    else:
        if 0 not in record.by_step:
            keep(0)
        train(
            config=as_begun(training, run_path),
            draft=setup.draft,
            target_lm_head=setup.target_lm_head,
            source=experiment.source,
            held_out=None,
            run_path=run_path,
            tracker=NoTracker(),
            on_progress=lambda progress: keep(progress.step) if progress.step in marks else None,
        )
    _decode(experiment, setup, record)
    record_path.write_text(record.model_dump_json(indent=1), encoding="utf-8")
    return record


def _begun(
    experiment: Experiment, setup: DraftSetup, training: TrainingConfig, *, is_scaled: bool
) -> RunRecord:
    """Give the draft its first weights."""
    begun = first_weights(setup, experiment.source, experiment.held_out, training)
    assert begun is not None
    assert not begun.refused, begun.refused
    if not is_scaled:
        _unscale(setup.draft, is_drawn=begun.is_drawn)
    return RunRecord(start_seconds=begun.seconds, start_tokens=begun.num_tokens)


def _decode(experiment: Experiment, setup: DraftSetup, record: RunRecord) -> None:
    stop_ids = conversation_tokenizer(experiment.target.config).stop_ids
    for result in decode_prompts(
        experiment.target,
        setup.draft,
        experiment.prompts,
        experiment.evaluation,
        stop_ids=stop_ids,
    ):
        rounds = result.speculative.rounds
        record.gained.append(sum(each.gained for each in rounds))
        record.rounds.append(len(rounds))


def _read(path: Path) -> RunRecord | None:
    if not path.exists():
        return None
    return RunRecord.model_validate_json(path.read_bytes())


@torch.no_grad()
def _unscale(draft: DraftModel, *, is_drawn: bool) -> None:
    """Let the draft read aux states of their own sizes, as before channels were scaled."""
    ones = torch.ones_like(draft.aux_scale)
    if is_drawn:
        draft.aux_scale.copy_(ones)  # the drawn `fc` stays as it is
    else:
        draft.set_aux_scale(ones)


def _measured(
    experiment: Experiment, setup: DraftSetup, training: TrainingConfig
) -> HeldOutFigures:
    dtype = multiplying_dtype(training.dtype, setup.draft.fc.weight.device)

    batches = held_out_batches(
        experiment.held_out,
        Windows.of(training, setup.draft.config),
        batch_tokens=2048,
        max_tokens=training.held_out_tokens,
    )
    step = measuring_step(setup.draft, training, dtype)
    return measure(step, batches, setup.draft.draft_rows(setup.target_lm_head, dtype))
