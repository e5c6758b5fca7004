"""What a training run says of itself: after every step, and when it has ended.

Shapes: L training-time-test steps.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What the last step, and the last measurement on the held-out split, gave."""

    loss: float
    first_loss: float
    """Of the very first step of the run."""
    step_losses: tuple[float, ...] = ()
    """[L] nats of cross-entropy, by training-time-test step, on the last step's batches."""
    step_accuracies: tuple[float, ...] = ()
    """[L] on the last step's batches."""
    held_out_step: int = 0
    """Step after which the figures below were measured; 0 without a held-out split."""
    held_out_length: float = 0.0
    """Tokens of one verifying forward, by joint prefixes: the best checkpoint has the most."""
    held_out_accuracies: tuple[float, ...] = ()
    """[L]; empty without a held-out split."""
    held_out_acceptances: tuple[float, ...] = ()
    """[L] chance that a sampled draft token is accepted."""
    held_out_prefixes: tuple[float, ...] = ()
    """[L] share of positions where the draft is right up to this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Told after every step."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """Where training ended."""

    num_steps: int
    """Steps of the run so far, earlier attempts included."""
    figures: Metrics
    tokens_per_second: float
    """Of this attempt, data and checkpoints included; 0 when nothing was left to do."""
    dtype: str
    """Of matrix products."""
    checkpoint_path: Path
    stopped: bool
    """SIGTERM ended this attempt before the last step."""
