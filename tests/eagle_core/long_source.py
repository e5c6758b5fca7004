"""A source of some short and some long samples of random states."""

import numpy as np

from tests.eagle_core.random_source import RandomSource


def long_source(lengths: list[int], *, num_groups: int = 3, seed: int = 0) -> RandomSource:
    """Return a source of samples of these lengths."""
    source = RandomSource(num_samples=len(lengths), seed=seed)
    source.lengths = np.array(lengths, dtype=np.int64)
    source.groups = np.arange(len(lengths)) * num_groups // len(lengths)
    return source
