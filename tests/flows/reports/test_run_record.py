"""The figures of a run's data."""

from pathlib import Path

import pytest

from eagle_core.tokenization.token_file import write_token_file
from flows.reports.run_record import SourceFigures, SplitFigures
from tests.flows.bridge.test_draft_setup import placed


@pytest.mark.parametrize("sources", [{}, {"chat": 2, "table": 1}])
def test_excluded_samples_count_for_nothing(tmp_path: Path, sources: dict[str, int]) -> None:
    samples = [
        placed(100, 3, "chat: a.jsonl, record 0"),
        placed(100, 2, "chat: a.jsonl, record 1"),
        placed(200, 5, "table: b.csv, record 0"),
    ]
    tokens = write_token_file(tmp_path / "train.arrow", samples, sources=sources)
    every, fewer = (
        SplitFigures.of(tokens, without=names) for names in ((), ("0" * 32, samples[1].sample_id))
    )
    assert (every.num_samples, every.num_tokens, every.num_supervised) == (3, 13, 10)
    assert (fewer.num_samples, fewer.num_tokens, fewer.num_supervised) == (2, 10, 8)
    table = SourceFigures(num_samples=1, num_supervised=5)
    for found, chat in ((every, (2, 5)), (fewer, (1, 3))):
        expected = {
            "chat": SourceFigures(num_samples=chat[0], num_supervised=chat[1]),
            "table": table,
        }
        assert found.by_source == (expected if sources else {})
