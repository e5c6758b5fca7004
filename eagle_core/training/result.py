"""What a training run reports after every step and at its end.

Shapes: L training-time-test steps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field

from eagle_core.training.config import BestBy
from eagle_core.training.decoded_points import DecodedPoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Metrics of the last step and of the last measurement on the held-out split."""

    loss: float
    first_loss: float
    """Loss of the first step of the run."""
    step_losses: tuple[float, ...] = ()
    """[L] cross-entropy in nats, by training-time-test step, on the last step's batches."""
    step_accuracies: tuple[float, ...] = ()
    """[L] on the last step's batches."""
    held_out_step: int = 0
    """Step after which the metrics below were measured; 0 without a held-out split."""
    held_out_length: float = 0.0
    """Tokens per verifying forward, from joint prefixes; largest for the best checkpoint."""
    held_out_accuracies: tuple[float, ...] = ()
    """[L]; empty without a held-out split."""
    held_out_acceptances: tuple[float, ...] = ()
    """[L] probability that a sampled draft token is accepted."""
    held_out_joint_prefix_accuracies: Annotated[
        tuple[float, ...],
        Field(
            validation_alias=AliasChoices("held_out_joint_prefix_accuracies", "held_out_prefixes")
        ),
    ] = ()
    """[L] joint-prefix accuracy: share of positions where the draft is correct up to this step."""

    def scalars(self) -> dict[str, float]:
        """Return what trackers show of the last step."""
        return {
            "loss": self.loss,
            **{f"loss/step_{step}": value for step, value in enumerate(self.step_losses)},
            **{f"accuracy/step_{step}": value for step, value in enumerate(self.step_accuracies)},
        }

    def held_out_scalars(self) -> dict[str, float]:
        """Return what trackers show of the last measurement."""
        named = {
            "accuracy": self.held_out_accuracies,
            "acceptance": self.held_out_acceptances,
            "prefix": self.held_out_joint_prefix_accuracies,
        }
        scalars = {
            f"held_out/{name}_{step}": value
            for name, values in named.items()
            for step, value in enumerate(values)
        }
        return {**scalars, "held_out/acceptance_length": self.held_out_length}


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How a run began, and what its draft was worth before the first step."""

    kind: str
    """closed_form, random, or the folder of a draft."""
    refit_from: tuple[int, ...] = ()
    """Aux layers that the given draft was trained on, if it was refit to others."""
    misfit: float = 0.0
    """Share of the mean square of its fused states that the layers at hand do not give."""
    num_tokens: int
    """Tokens from which it was made."""
    seconds: float
    refused: str = ""
    """Why solved weights were not used, but drawn ones; else empty."""
    accuracies: tuple[float, ...] = ()
    """[L] by training-time-test step; empty for random weights."""
    acceptance_length: float = 0.0
    """From joint prefixes, as `Metrics.held_out_length`; 0 for random weights."""
    is_held_out: bool = True
    """Whether both were measured on held-out samples; else on some of its own."""

    @property
    def is_drawn(self) -> bool:
        """Return whether the run began with random weights, chosen or not."""
        return not self.accuracies

    def scalars(self) -> dict[str, float]:
        """Return its held-out figures, named as those of later steps."""
        if self.is_drawn or not self.is_held_out:
            return {}
        named = {f"held_out/accuracy_{step}": value for step, value in enumerate(self.accuracies)}
        return {**named, "held_out/acceptance_length": self.acceptance_length}


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Passed to the progress callback after every step."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best checkpoint, and what it was chosen by."""

    step: int
    by: BestBy
    length: float
    """Its acceptance length, by that measure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """State of the run at the end of an attempt."""

    num_steps: int
    """Steps of the run so far, earlier attempts included."""
    figures: Metrics
    tokens_per_second: float
    """Of this attempt, data and checkpoints included, but not the time in which training waited for
    decoding; 0 if the run was already complete."""
    dtype: str
    """Of matrix products."""
    checkpoint_path: Path
    stopped: bool
    """SIGTERM ended this attempt before the last step."""
    best: Best | None = None
    """None if nothing was measured at the step of a checkpoint."""
    decoded: DecodedPoint | None = None
    """What was decoded last; None if nothing was."""
