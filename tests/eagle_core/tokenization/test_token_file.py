"""Token files: whole or absent, each sample once, random access by id."""

from pathlib import Path

import numpy as np
import pytest

from eagle_core.errors import CorruptError
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from tests.eagle_core.target.test_model import tokenized


def test_round_trip_in_order_without_doubles(tmp_path: Path) -> None:
    samples = tokenized([3, 9, 400, 1])
    file = write_token_file(tmp_path / "train.arrow", [*samples, samples[1]])
    assert len(file) == 4
    assert file.lengths.tolist() == [3, 9, 400, 1]
    assert file.num_supervised == sum(int(sample.loss_mask.sum()) for sample in samples)
    for found, sample in zip(file, samples, strict=True):
        assert found.sample_id == sample.sample_id
        assert np.array_equal(found.input_ids, sample.input_ids)
        assert np.array_equal(found.loss_mask, sample.loss_mask)
    last = file.by_id([samples[3].sample_id])[0]
    assert last.sample_id == samples[3].sample_id
    assert samples[0].sample_id in file
    assert "absent" not in file


def test_an_empty_split_is_a_file_too(tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "held_out.arrow", [])
    assert (len(file), file.num_supervised, file.sample_ids) == (0, 0, [])


def test_a_break_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield tokenized([5])[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_file(tmp_path / "train.arrow", broken())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.arrow"
    write_token_file(path, tokenized([5, 6]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptError, match=r"train\.arrow is not a complete token file"):
        TokenFile(path)
