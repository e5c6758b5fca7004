"""Token files: whole or absent, each sample once, random access by id."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from eagle_core.errors import CorruptError
from eagle_core.tokenization import token_file
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


def test_samples_are_told_apart_by_the_source_of_their_location(tmp_path: Path) -> None:
    samples = tokenized([3, 9, 400, 1])
    places = ["b: x.jsonl, record 0", "a: y.jsonl, record 0", "b: a: z", "a: y.jsonl, record 1"]
    placed = [replace(one, location=where) for one, where in zip(samples, places, strict=True)]
    sources = {"a": 3, "b": 2, "empty": 0}
    written = write_token_file(tmp_path / "train.arrow", placed, sources=sources)
    for file in (written, TokenFile(tmp_path / "train.arrow")):
        assert file.sources == sources
        rows = {name: found.tolist() for name, found in file.rows_by_source().items()}
        assert rows == {"a": [1, 3], "b": [0, 2], "empty": []}
    single = write_token_file(tmp_path / "single.arrow", placed)
    assert (single.sources, single.rows_by_source()) == ({}, {})


def test_a_split_to_which_no_source_gave_anything_has_all_of_them(tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "held_out.arrow", [], sources={"a": 0, "b": 0})
    assert {name: len(rows) for name, rows in file.rows_by_source().items()} == {"a": 0, "b": 0}


def test_files_of_earlier_versions_have_no_sources(tmp_path: Path) -> None:
    write_token_file(tmp_path / "new.arrow", tokenized([3, 9]), sources={"a": 2})
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "new.arrow"))).read_all()
    for kept in (table.drop_columns("location"), table.replace_schema_metadata(None)):
        with pa.ipc.new_file(str(tmp_path / "old.arrow"), kept.schema) as writer:
            writer.write_table(kept)
        file = TokenFile(tmp_path / "old.arrow")
        assert file.rows_by_source() == {}
        assert file.lengths.tolist() == [3, 9]


def test_long_samples_are_written_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_file, "_BYTES_PER_BATCH", 5 * 1000)
    samples = tokenized([400, 600, 2, 1500, 3, 5])
    file = write_token_file(tmp_path / "train.arrow", samples)
    with pa.ipc.open_file(str(tmp_path / "train.arrow")) as reader:
        sizes = [reader.get_batch(at).num_rows for at in range(reader.num_record_batches)]
    assert sizes == [2, 2, 2]
    assert [found.sample_id for found in file] == [sample.sample_id for sample in samples]
    expected = [int(sample.loss_mask.sum()) for sample in samples]
    assert file.supervised_lengths.tolist() == expected
    assert file.num_supervised == sum(expected)
