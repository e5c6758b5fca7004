"""Some rows of a token file, from across the file and always the same."""

import numpy as np

from eagle_core.tokenization.token_file import TokenFile


def spread_rows(file: TokenFile, count: int) -> list[int]:
    """Return up to `count` different rows, ordered so that every prefix is spread."""
    order = np.random.default_rng(0).permutation(len(file))
    return [int(row) for row in order[:count]]


def rows_of_tokens(file: TokenFile, num_tokens: int) -> tuple[int, ...]:
    """Return rows with `num_tokens` tokens or a little more; all rows if the file has fewer."""
    order = spread_rows(file, len(file))
    ends = np.cumsum(file.lengths[order])
    return tuple(order[: int(np.searchsorted(ends, num_tokens)) + 1])
