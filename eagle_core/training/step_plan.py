"""Where a training step computes, worked out on the host before the step begins.

All of it follows from masks and borders of a batch. Worked out on a GPU, each border would have to
be waited for, in the middle of the step; the loader's thread does it one step ahead.

Shapes: N packed tokens, L training-time-test steps, A_i indices of step i, R loss rows of all
steps, U teacher tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagle_core.training.config import TttConfig
from eagle_core.training.positions import TttPositions, ttt_positions


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HostRows:
    """Where queries stand, on the host."""

    indices: Tensor
    """[A] in the packed batch, ascending"""
    first: Tensor
    """[A] index of the first token of its sequence"""

    @classmethod
    def of(cls, indices: Tensor, first: Tensor) -> "HostRows":
        """Copy both to the host."""
        return cls(indices=indices.cpu(), first=first.cpu())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossRows:
    """The loss rows of all steps, sorted by teacher token."""

    rows: Tensor
    """[R] index of each row in the concatenation of all steps"""
    step: Tensor
    """[R]"""
    index: Tensor
    """[R] index t in the packed batch"""
    tokens: Tensor
    """[U] the tokens after which the target's distribution is a teacher, ascending"""
    token_of_row: Tensor
    """[R] place of a row's teacher token in `tokens`; non-decreasing"""
    rows_of_token: tuple[int, ...]
    """[U] on the host"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepPlan:
    """Where each step of a batch computes, and where its loss counts."""

    positions: TttPositions
    position: Tensor
    """[N] index of each token in its own sequence"""
    kept: tuple[Tensor, ...]
    """[L] of [A_i] place of each index among those of the step before; of step 0: itself"""
    counted: tuple[Tensor, ...]
    """[L] places, among the indices of step i, where the loss counts"""
    loss: LossRows
    every: HostRows
    """All indices but the last token's."""
    by_step: tuple[HostRows, ...]
    """[L] those of each step"""

    def tensors(self) -> list[Tensor]:
        """Return all tensors that move."""
        found: list[Tensor] = []
        self._mapped(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "StepPlan":
        """Return the plan for a step on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> "StepPlan":
        """Return the plan in memory from which a CUDA device copies while it computes."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "StepPlan":
        positions, loss = self.positions, self.loss
        return replace(
            self,
            positions=replace(
                positions,
                supervised=change(positions.supervised),
                counted=change(positions.counted),
                indices=tuple(map(change, positions.indices)),
                shares=change(positions.shares),
                totals=change(positions.totals),
            ),
            position=change(self.position),
            kept=tuple(map(change, self.kept)),
            counted=tuple(map(change, self.counted)),
            loss=replace(
                loss,
                rows=change(loss.rows),
                step=change(loss.step),
                index=change(loss.index),
                tokens=change(loss.tokens),
                token_of_row=change(loss.token_of_row),
            ),
        )


def plan_step(
    *,
    loss_mask: Tensor,
    in_vocabulary: Tensor,
    starts: Sequence[int],
    options: TttConfig,
    own: Sequence[range] | None = None,
    position_weights: Tensor | None = None,
) -> StepPlan:
    """Return the plan of a batch; all tensors are on the CPU.

    Args:
        loss_mask: [N] bool, token is the assistant's.
        in_vocabulary: [N] bool, the target's argmax after this token is in the draft vocabulary.
        starts: [S + 1] borders of the sequences.
        options: settings of the step.
        own: [S] the indices of each sequence whose loss counts; None: all.
        position_weights: [N] float32 factor of each index in the loss; None: 1 everywhere.

    """
    positions = ttt_positions(
        loss_mask=loss_mask,
        in_vocabulary=in_vocabulary,
        starts=starts,
        ttt_length=options.ttt_length,
        positions=options.loss_positions,
        reduction=options.loss_reduction,
        own=own,
        position_weights=position_weights,
    )
    token = torch.arange(len(loss_mask))
    borders = torch.tensor(starts)
    first = borders[torch.searchsorted(borders, token, right=True) - 1]
    every = token[:-1]
    counted = tuple(
        positions.counted[step, indices].nonzero().squeeze(1)
        for step, indices in enumerate(positions.indices)
    )
    return StepPlan(
        positions=positions,
        position=token - first,
        kept=tuple(_kept(every, positions.indices)),
        counted=counted,
        loss=_loss_rows([i[c] for i, c in zip(positions.indices, counted, strict=True)]),
        every=HostRows(indices=every, first=first[:-1]),
        by_step=tuple(
            HostRows(indices=indices, first=first[indices]) for indices in positions.indices
        ),
    )


def _kept(every: Tensor, by_step: Sequence[Tensor]) -> Iterator[Tensor]:
    before = every
    for indices in by_step:
        yield torch.searchsorted(before, indices)
        before = indices


def _loss_rows(index_by_step: Sequence[Tensor]) -> LossRows:
    index = torch.cat(list(index_by_step))
    counts = torch.tensor([len(one) for one in index_by_step])
    step = torch.arange(len(index_by_step)).repeat_interleave(counts)
    order = torch.argsort(index + 1 + step, stable=True)
    step, index = step[order], index[order]
    tokens, token_of_row, rows_of_token = torch.unique_consecutive(
        index + 1 + step, return_inverse=True, return_counts=True
    )
    return LossRows(
        rows=order,
        step=step,
        index=index,
        tokens=tokens,
        token_of_row=token_of_row,
        rows_of_token=tuple(rows_of_token.tolist()),
    )
