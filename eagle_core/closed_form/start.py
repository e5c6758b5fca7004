"""A draft's first weights, solved from the states of its target.

Each part is a ridge regression: the recurrence (`recurrence`), then the feed-forward block's last
matrix in the network that it is written into (`layer`, `feed_forward`). A solution that is not
finite, or that agrees with the target less often than a draft that always proposes the same token,
is refused: the draft is then left as it was drawn. So is a variant of the draft for which the
recurrence cannot be written (`why_not_solved`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from eagle_core.closed_form.feed_forward import solve_feed_forward
from eagle_core.closed_form.layer import Channels, write_recurrence
from eagle_core.closed_form.predictions import Predictions
from eagle_core.closed_form.recurrence import fit_recurrence
from eagle_core.closed_form.state_sizes import StateSizes
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError
from eagle_core.training.config import TttConfig
from eagle_core.training.distributed import Processes
from eagle_core.training.packing import PackedBatch
from eagle_core.training.ttt import batch_positions
from eagle_core.training.validation import HeldOutFigures, Step, measure

_TOKENS_PER_INPUT = 40


def why_not_solved(config: DraftConfig) -> str:
    """Return the variants that the closed form does not hold for, and why; empty if it holds."""
    obstacles = {
        "draft.qk_norm norms the queries and keys by which a head finds its own position": (
            config.qk_norm
        ),
        "draft.norm_before_residual norms the state that each step carries on": (
            config.norm_before_residual
        ),
        f"draft.hidden_size is {config.hidden_size}, but the states to predict have the target's "
        f"{config.target_hidden_size}": config.has_own_embedding,
        "draft.target_head is frozen, and norm_output puts what is no prediction before it": (
            config.target_head and config.norm_output
        ),
    }
    return "; ".join(why for why, is_there in obstacles.items() if is_there)


def tokens_needed(draft: DraftModel) -> int:
    """Return on how many tokens to solve: 40 per input of the largest regression.

    With half as many the draft is a little worse, with twice as many a little better
    (docs/closed-form.md).
    """
    return _TOKENS_PER_INPUT * (draft.fc.in_features + draft.config.hidden_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedStart:
    """What solved weights are worth, or why they were refused."""

    figures: HeldOutFigures | None = None
    """Before the first step of training; None if they were refused."""
    refused: str = ""
    """Empty if the draft has the solved weights."""


@torch.no_grad()
def solve_start(
    draft: DraftModel,
    batches: Iterable[PackedBatch],
    measured: Callable[[], Iterable[PackedBatch]],
    sizes: StateSizes,
    target_head: Tensor,
    step: Step,
    options: TttConfig,
    processes: Processes,
) -> SolvedStart:
    """Solve the weights of `draft` in place, or leave it as it was drawn and say why.

    Args:
        draft: drawn, with its `aux_scale`, the same on all processes.
        batches: this process's share of the sample; read about five times.
        measured: returns batches to measure the solution on, the same on all processes.
        sizes: of the target's states.
        target_head: [D, Ht] the target's head rows of the draft vocabulary, on the draft's device.
        step: measures the draft on a batch.
        options: the training-time-test settings of the run.
        processes: all of which call this; all decide alike.

    """
    if obstacle := why_not_solved(draft.config):
        return SolvedStart(refused=f"they cannot be solved for this draft: {obstacle}")
    drawn = {name: part.cpu().clone() for name, part in draft.state_dict().items()}
    figures = None
    try:
        _solve(draft, batches, sizes, options, processes)
        figures = measure(step, measured(), target_head)
        refused = _objection(draft, figures, _share_of_one_token(draft, measured(), options))
    except (ConfigError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        refused = f"they cannot be solved: {error}"
    if processes.any(bool(refused)):
        draft.load_tensors(drawn)
        return SolvedStart(refused=refused or "another process refused them")
    return SolvedStart(figures=figures)


def _objection(draft: DraftModel, figures: HeldOutFigures, floor: float) -> str:
    """Return why a solution is no good, or an empty text."""
    if not all(bool(torch.isfinite(part).all()) for part in draft.parameters()):
        return "they are not finite"
    accuracy = sum(figures.accuracies) / len(figures.accuracies)
    if accuracy > floor:
        return ""
    return (
        f"they agree with the target at {accuracy:.1%} of the positions of all steps, and a draft "
        f"that always proposes the same token at {floor:.1%}"
    )


def _solve(
    draft: DraftModel,
    batches: Iterable[PackedBatch],
    sizes: StateSizes,
    options: TttConfig,
    processes: Processes,
) -> None:
    device, gain = draft.fc.weight.device, sizes.final_gain

    def rows_of(batch: PackedBatch) -> Predictions:
        return Predictions.of(draft, batch, sizes, options)

    on_device = _Mapped(batches, lambda batch: batch.to(device))
    found = fit_recurrence(_Mapped(on_device, rows_of), draft, processes)
    channels = Channels.of(draft, gain)
    write_recurrence(draft, found, gain=gain, channels=channels)
    solve_feed_forward(draft, on_device, rows_of, options, processes, channels=channels)


def _share_of_one_token(
    draft: DraftModel, batches: Iterable[PackedBatch], options: TttConfig
) -> float:
    """Return the share of positions where the draft's most frequent token is the target's."""
    counts: Counter[int] = Counter()
    num_positions = 0
    for batch in batches:
        positions = batch_positions(draft.t2d.to(batch.input_ids.device), batch, options)
        at = positions.counted[0].nonzero().squeeze(1) + 1  # others are not in its vocabulary
        counts.update(batch.target_argmax[at].tolist())
        num_positions += int(positions.supervised[0].sum())
    return max(counts.values(), default=0) / max(num_positions, 1)


Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _Mapped(Generic[Given, Made]):
    """Items that are made anew in each pass."""

    items: Iterable[Given]
    make: Callable[[Given], Made]

    def __iter__(self) -> Iterator[Made]:
        return map(self.make, self.items)
