"""A draft's first weights, solved from the states of its target.

Each part is a ridge regression: the recurrence (`recurrence`), then the feed-forward block's last
matrix in the network that it is written into (`layer`, `feed_forward`). A solution that is not
finite, or that agrees with the target less often than a draft that always proposes the same token,
is refused: the draft is then left as it was drawn.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from eagle_core.closed_form.feed_forward import solve_feed_forward
from eagle_core.closed_form.layer import Channels, write_recurrence
from eagle_core.closed_form.predictions import Predictions
from eagle_core.closed_form.recurrence import fit_recurrence
from eagle_core.closed_form.state_sizes import StateSizes
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError
from eagle_core.training.config import TttConfig
from eagle_core.training.distributed import Processes
from eagle_core.training.packing import PackedBatch
from eagle_core.training.ttt import batch_positions, ttt_step
from eagle_core.training.validation import HeldOutFigures, measure

_TOKENS_PER_INPUT = 40


def tokens_needed(draft: DraftModel) -> int:
    """Return on how many tokens to solve: 40 per input of the largest regression.

    With a quarter of them the accuracy is clearly lower; four times as many add little
    (docs/benchmarks/start.md).
    """
    return _TOKENS_PER_INPUT * (draft.fc.in_features + draft.config.hidden_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedStart:
    """What a solution is worth, and why it was refused if it was."""

    figures: HeldOutFigures
    """Of the solution, before the first step of training."""
    refused: str = ""
    """Empty if the draft has the solved weights."""


@torch.no_grad()
def solve_start(
    draft: DraftModel,
    batches: Iterable[PackedBatch],
    measured: Sequence[PackedBatch],
    sizes: StateSizes,
    target_head: Tensor,
    options: TttConfig,
    processes: Processes,
) -> SolvedStart:
    """Solve the weights of `draft` in place, or leave it as it was drawn and say why.

    Args:
        draft: drawn, with its `aux_scale`, the same on all processes.
        batches: this process's share of the sample; read about six times.
        measured: batches to measure the solution on, the same on all processes.
        sizes: of the target's states.
        target_head: [D, Ht] the target's head rows of the draft vocabulary, on the draft's device.
        options: the training-time-test settings of the run.
        processes: all of which call this.

    """
    drawn = {name: part.cpu().clone() for name, part in draft.state_dict().items()}
    try:
        _solve(draft, batches, sizes, options, processes)
        refused = ""
    except (ConfigError, RuntimeError) as error:
        refused = f"it cannot be solved: {error}"
    figures = measure(
        lambda batch, head: ttt_step(draft, batch, head, options), measured, target_head
    )
    floor = _accuracy_of_one_token(draft, measured, options)
    if not refused and not figures.accuracies[0] > floor:
        refused = (
            f"the solved draft agrees with the target at {figures.accuracies[0]:.1%} of the "
            f"positions, and one that always proposes the same token at {floor:.1%}"
        )
    if processes.any(bool(refused)):
        draft.load_tensors(drawn)
    return SolvedStart(figures=figures, refused=refused)


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
    between = gain if draft.config.norm_output else torch.ones_like(gain)
    num_aux = draft.fc.in_features
    found = fit_recurrence(_Mapped(on_device, rows_of), between, num_aux, processes)
    channels = Channels.of(draft, gain)
    write_recurrence(draft, found, gain=gain, channels=channels)
    solve_feed_forward(draft, on_device, rows_of, options, processes, channels=channels)


def _accuracy_of_one_token(
    draft: DraftModel, batches: Iterable[PackedBatch], options: TttConfig
) -> float:
    """Return the share of positions where the target's most frequent next token is the next."""
    counts: Counter[int] = Counter()
    for batch in batches:
        supervised = batch_positions(draft.t2d.to(batch.input_ids.device), batch, options)
        at = supervised.supervised[0].nonzero().squeeze(1) + 1
        counts.update(batch.target_argmax[at].tolist())
    return max(counts.values(), default=0) / max(counts.total(), 1)


Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _Mapped(Generic[Given, Made]):
    """Items that are made anew in each pass."""

    items: Iterable[Given]
    make: Callable[[Given], Made]

    def __iter__(self) -> Iterator[Made]:
        return map(self.make, self.items)
