"""Second moments of a linear regression, summed over batches, and its ridge solution.

Sums are float64. Products within a batch are float32: their rounding, 1e-6 of a sum, is far below
the ridge, and consumer GPUs multiply float64 at a sixtieth of the speed.

Shapes: R rows, F features, Y targets.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eagle_core.errors import ConfigError
from eagle_core.training.distributed import Processes

RIDGE = 0.13
"""Ridge / (mean square of a feature), for as many rows as features; it falls with more rows."""


class Moments:
    """Sums from which a linear map of features to targets is solved."""

    def __init__(self, num_features: int, num_targets: int, device: torch.device) -> None:
        """Start with no rows."""
        self.gram = _zeros(num_features, num_features, device=device)
        """[F, F]"""
        self.cross = _zeros(num_features, num_targets, device=device)
        """[F, Y]"""
        self.num_rows = _zeros(num_features, device=device)
        """[F] rows that have this feature."""

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows: features [R, F] and targets [R, Y]."""
        with _exact_products():
            features, targets = features.float(), targets.float()
            self.gram += features.T @ features
            self.cross += features.T @ targets
        self.num_rows += len(features)

    def sum_over(self, processes: Processes) -> None:
        """Add the rows of all processes; each must call this."""
        for sums in (self.gram, self.cross, self.num_rows):
            sums.copy_(processes.total(sums))

    def solve(self, features: slice | Tensor = slice(None), *, ridge: float = RIDGE) -> Tensor:
        """Return [F, Y] float64 the ridge regression on `features`, by default on all.

        `features` is a slice or a tensor of indices.

        The ridge is relative to each feature's mean square, so the solution is independent of
        their units. It falls with the rows per feature: on SmolLM2's states 33,000 rows of 2,304
        features agree best with a hundredth, 250,000 with a thousandth.

        Raises:
            ConfigError: the sums are not finite, or no row was added.

        """
        damped, cross = self._damped(features, ridge), self.cross[features]
        if not bool(torch.isfinite(damped).all() and torch.isfinite(cross).all()):
            raise ConfigError("the sums over the states are not finite")
        if not bool(self.num_rows.any()):
            raise ConfigError("no position of the sampled data counts")
        factors = torch.linalg.cholesky(damped)
        solution: Tensor = torch.cholesky_solve(cross, factors)
        return solution

    def drop(self, is_dropped: Tensor) -> None:
        """Make features [F] (bool) as if they had always been zero: their weights are zero."""
        self.gram[is_dropped] = 0
        self.gram[:, is_dropped] = 0
        self.cross[is_dropped] = 0

    def unexplained(self, features: slice, by: slice) -> Tensor:
        """Return the second moments of `features` that a regression on features `by` leaves."""
        shared = self.gram[by, features]
        explained: Tensor = shared.T @ torch.linalg.solve(self._damped(by, RIDGE), shared)
        return self.gram[features, features] - explained

    def _damped(self, features: slice | Tensor, ridge: float) -> Tensor:
        damped = self.gram[features][:, features].clone()
        squares = damped.diagonal()
        damping = squares * ridge * len(damped) / self.num_rows[features].clamp(min=1)
        # A feature that is always zero gets the weight zero.
        squares += torch.where(squares > 0, damping, 1.0)
        return damped


def _zeros(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=device)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Multiply float32 in float32: on GPUs, TF32 would keep 10 bits of each factor."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
