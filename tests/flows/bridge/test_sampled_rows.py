"""Rows from across a token file: enough, no more, and always the same."""

from pathlib import Path

import numpy as np
import pytest

from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from flows.bridge.sampled_rows import rows_of_tokens, spread_rows


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    """40 samples of 10 to 49 tokens."""
    samples = []
    for length in range(10, 50):
        ids = np.arange(length, dtype=np.int32)
        mask = np.ones(length, dtype=np.bool_)
        samples.append(
            TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)
        )
    return write_token_file(tmp_path / "train.arrow", samples)


def test_rows_are_of_the_whole_file(file: TokenFile) -> None:
    rows = spread_rows(file, 10)
    assert len(set(rows)) == 10
    assert min(rows) < 10
    assert max(rows) >= 30
    assert spread_rows(file, 5) == rows[:5]
    assert sorted(spread_rows(file, 1000)) == list(range(40))


def test_rows_have_so_many_tokens_and_not_one_row_more(file: TokenFile) -> None:
    rows = rows_of_tokens(file, 200)
    assert file.lengths[list(rows)].sum() >= 200
    assert file.lengths[list(rows[:-1])].sum() < 200
    assert rows == tuple(spread_rows(file, len(rows)))
    assert sorted(rows_of_tokens(file, 10_000)) == list(range(40))
