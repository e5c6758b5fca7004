"""Measure a draft on the held-out split, from stored or computed states, without gradients."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from eagle_core.draft.model import DraftModel
from eagle_core.samples import SampleSource
from eagle_core.training.config import TttConfig
from eagle_core.training.loader import batch_borders
from eagle_core.training.packing import PackedBatch
from eagle_core.training.pieces import PieceReader, Windows
from eagle_core.training.ttt import TttOutcome, ttt_step

Step = Callable[[PackedBatch, torch.Tensor], TttOutcome]
"""Measures a draft on a batch, with a target head, in the arithmetic of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutFigures:
    """Means over the held-out positions, by training-time-test step."""

    accuracies: tuple[float, ...]
    """[L] share of supervised positions where draft and target have the same argmax."""
    acceptances: tuple[float, ...]
    """[L] mean of sum(min(p, q)); 0 where the target's argmax is outside the draft vocabulary."""
    joint_prefix_accuracies: tuple[float, ...]
    """[L] joint-prefix accuracy: share of positions correct in this and all earlier steps."""

    @property
    def length(self) -> float:
        """Return the tokens per verifying forward, 1 to L + 1, with greedy drafting."""
        return 1 + sum(self.joint_prefix_accuracies)


def measuring_step(draft: DraftModel, options: TttConfig, dtype: torch.dtype) -> Step:
    """Return what measures `draft` on a batch, with matrix products in `dtype`."""

    def step(batch: PackedBatch, target_head: torch.Tensor) -> TttOutcome:
        device, is_mixed = target_head.device.type, dtype != torch.float32
        with torch.autocast(device, dtype=dtype, enabled=is_mixed):
            return ttt_step(draft, batch, target_head, options)

    return step


@torch.no_grad()
def measure(
    step: Step,
    batches: Iterable[PackedBatch],
    target_head: torch.Tensor,
) -> HeldOutFigures:
    """Return the draft's metrics on `batches`, which are moved to the head's device."""
    outcomes = [step(batch.to(target_head.device), target_head) for batch in batches]
    supervised = sum(outcome.step_supervised for outcome in outcomes)
    correct = sum(outcome.step_correct for outcome in outcomes)
    acceptance = sum(outcome.step_acceptance for outcome in outcomes)
    prefix = sum(outcome.step_prefix for outcome in outcomes)
    supervised = torch.as_tensor(supervised).clamp(min=1)
    return HeldOutFigures(
        accuracies=tuple(torch.as_tensor(correct / supervised).tolist()),
        acceptances=tuple(torch.as_tensor(acceptance / supervised).tolist()),
        joint_prefix_accuracies=tuple(torch.as_tensor(prefix / supervised[0]).tolist()),
    )


def held_out_batches(
    source: SampleSource, windows: Windows, *, batch_tokens: int, max_tokens: int
) -> Iterator[PackedBatch]:
    """Yield the first `max_tokens` tokens of `source`, in source order, divided as in training."""
    num_tokens, reader = 0, PieceReader(source)
    pieces = windows.pieces(source.lengths)
    for first, end in pairwise(batch_borders(pieces.sizes, batch_tokens).tolist()):
        if num_tokens >= max_tokens:
            return
        batch = reader.read(pieces[first:end])
        yield batch
        num_tokens += batch.num_own_tokens
