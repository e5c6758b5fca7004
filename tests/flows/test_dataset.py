"""What the flow `dataset` says in a terminal and in its log."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prefect import flow

from eagle_core.data.build import load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.dataset import dataset_flow
from flows.tasks.prepare import prepare_dataset
from flows.tasks.tokenize import tokenize
from flows.workspace import Workspace
from tests import tiny

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


def chat(number: int, *, doubled: bool = False, **fields: object) -> dict[str, object]:
    question = {"from": "human", "value": f"What is {number}?"}
    turns = [question, *([question] if doubled else []), {"from": "gpt", "value": "A number."}]
    return {"conversations": turns, **fields}


def written(path: Path, records: Sequence[object]) -> DatasetConfig:
    path.write_text(json.dumps(records), encoding="utf-8")
    return DatasetConfig(name="chats", source=str(path), held_out_fraction=0.0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name.startswith("prefect.task_runs")
    ]


def test_a_terminal_shows_what_was_read_kept_dropped_and_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    records = [chat(number, doubled=number < 5, score=number) for number in range(6)]
    dataset = written(tmp_path / "a.json", records)
    summary = dataset_flow(dataset, home=str(tmp_path))
    printed = capsys.readouterr().out
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if "│" in line]
    table = {name.strip(): value.strip() for name, value in rows}
    ledger = str(tmp_path / "datasets" / "chats" / "ledger.parquet")
    expected = {
        "records read": "6",
        "conversations to train on": "1",
        "dropped": "5 (83.3%)",
        "dropped: wrong_alternation": "5",
        "not read: score": "1",
        "ledger, with locations": ledger,
    }
    assert table == table | expected
    assert len(pq.read_table(ledger)) == 6
    assert (summary.num_dropped, summary.unread) == (5, {"score": 1})
    assert f"6 records: 1 to train on, 0 held out, 5 dropped; ledger: {ledger}" in caplog.text
    assert "fields not read: score 1" in caplog.text
    (warning,) = warnings(caplog)
    assert warning.startswith("83 % of the records")
    assert "wrong_alternation 5" in warning


def test_a_data_set_that_exists_says_the_same_and_a_small_loss_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = written(
        tmp_path / "a.json", [chat(number, doubled=number == 0) for number in range(20)]
    )
    for _ in range(2):
        caplog.clear()
        dataset_flow(dataset, home=str(tmp_path))
        assert "20 records: 19 to train on, 0 held out, 1 dropped" in caplog.text
        assert "dropped: wrong_alternation 1" in caplog.text
        assert warnings(caplog) == []


def test_many_fields_that_are_not_read_are_a_short_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {f"column {number:02d}": number for number in range(30)}
    dataset_flow(written(tmp_path / "a.json", [chat(0, **many)]), home=str(tmp_path))
    printed = capsys.readouterr().out
    assert "not read: column 11" in printed
    assert "not read: column 12" not in printed
    assert "18 fields" in printed


def test_questions_are_prepared_for_a_target_that_answers_them(
    tmp_path: Path, target: TargetConfig
) -> None:
    """And not for training, whatever the folder holds."""
    home = str(tmp_path)
    path = tiny.write_conversations(tmp_path / "a.json", 8)
    records = [*json.loads(path.read_text("utf-8")), {"prompt": "Why?"}, {"prompt": "Who?"}]
    dataset = written(tmp_path / "b.json", records)
    space = Workspace.at(home, target=target.name, dataset=dataset.name)

    @flow
    def both() -> tuple[int, int, int]:
        asked = prepare_dataset(dataset, space, questions_suffice=True)
        last = [one.messages[-1].role for one in load_conversations(asked.path, "train")]
        trained = prepare_dataset(dataset, space)
        assert trained.dropped == {"no_assistant_turn": 2}
        return last.count("user"), asked.num_train, tokenize(target, dataset, space).num_samples

    assert both() == (2, 10, 8)


def test_several_sources_have_a_row_each_and_what_a_weight_leaves_out_is_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sources = []
    for name, first in {"one": 0, "two": 100}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([chat(first + number) for number in range(40)]))
        sources.append({"name": name, "source": str(path), "weight": 0.5})
    dataset = DatasetConfig.model_validate(
        {"name": "mix", "sources": sources, "held_out_fraction": 0.0}
    )
    summary = dataset_flow(dataset, home=str(tmp_path))
    assert summary.dropped.keys() == {"not_selected"}
    assert summary.dropped_share == 0
    assert not warnings(caplog)
    printed = capsys.readouterr().out
    for name in ("one", "two"):
        kept = summary.by_source[name].num_train
        assert 0 < kept < 40
        assert f"40 read, {kept} to train on, 0 held out" in printed
