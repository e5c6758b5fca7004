"""Sums of products, and the regression that they give."""

import numpy as np
import pytest
import torch

from eagle_core.closed_form.moments import RIDGE, Moments
from eagle_core.errors import ConfigError

CPU = torch.device("cpu")


def rows(seed: int, num_rows: int, num_features: int, num_targets: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, num_features, generator=generator)
    return [features, torch.randn(num_rows, num_targets, generator=generator)]


def test_the_solution_is_that_of_a_ridge_regression() -> None:
    features, targets = rows(0, 50, 4)
    features[:, 0] *= 1000  # the ridge is relative to a feature's size
    sums = Moments(4, 2, CPU)
    sums.add(features[:20], targets[:20])
    sums.add(features[20:], targets[20:])
    x, y = features.double().numpy(), targets.double().numpy()
    gram = x.T @ x
    expected = np.linalg.solve(gram + np.diag(np.diag(gram)) * RIDGE * 4 / 50, x.T @ y)
    np.testing.assert_allclose(sums.solve().numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(
        sums.solve(slice(1, 3), ridge=0).numpy(), np.linalg.lstsq(x[:, 1:3], y)[0], rtol=1e-4
    )


def test_a_feature_that_is_always_zero_has_no_weight() -> None:
    features, targets = rows(0, 50, 3)
    features[:, 1] = 0
    sums = Moments(3, 2, CPU)
    sums.add(features, targets)
    solution = sums.solve()
    assert torch.isfinite(solution).all()
    assert not solution[1].any()
    assert solution[[0, 2]].all()


def test_what_a_regression_leaves() -> None:
    features, targets = rows(0, 2000, 2, num_targets=1)
    told = features @ torch.tensor([[1.0], [-2.0]])
    sums = Moments(4, 1, CPU)
    sums.add(torch.cat([features, told, targets], dim=1), targets)
    left = sums.unexplained(slice(2, 4), by=slice(0, 2)) / 2000
    assert left[0, 0] < 1e-3
    assert left[1, 1] == pytest.approx(float(targets.square().mean()), rel=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(bad: float) -> None:
    features, targets = rows(0, 5, 3)
    features[2, 1] = bad
    sums = Moments(3, 2, CPU)
    sums.add(features, targets)
    with pytest.raises(ConfigError, match="not finite"):
        sums.solve()


def test_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="no position"):
        Moments(3, 2, CPU).solve()
