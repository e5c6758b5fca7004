"""What the stage of the tokens says, and that it stops where nothing is left."""

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.config import TemplateConfig
from flows.summaries import TokensSummary
from flows.tasks.prepare import prepare

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


@flow
def tokens(target: TargetConfig, dataset: DatasetConfig, home: str) -> TokensSummary:
    return prepare(target, dataset, home)[1]


def prompt_tokens(target: TargetConfig, dataset: DatasetConfig, home: str) -> int:
    """Return the smallest `max_length` that reaches an answer."""
    with pytest.raises(ConfigError, match=r"shortest answer starts at token (\d+)") as caught:
        tokens(target, dataset.model_copy(update={"max_length": 2}), home)
    return int(str(caught.value).partition("starts at token ")[2].partition(")")[0])


def test_a_max_length_below_every_prompt_is_said_with_the_length_that_suffices(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    start = prompt_tokens(target, dataset, str(tmp_path))
    for short in (8, start):
        with pytest.raises(ConfigError, match=rf"max_length {short} is shorter than every prompt"):
            tokens(target, dataset.model_copy(update={"max_length": short}), str(tmp_path))
    left = tokens(target, dataset.model_copy(update={"max_length": start + 1}), str(tmp_path))
    assert left.num_supervised_tokens >= 1


def test_what_was_dropped_is_told_with_the_ledger_and_kept_when_nothing_is_left(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusing = TemplateConfig(
        chat_template="{% if messages[0].content != 'a' %}{{ 1 // 0 }}{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    caplog.set_level(logging.INFO)
    with pytest.raises(ConfigError, match=r"no sample to train on is left.*dropped\.parquet"):
        tokens(target.model_copy(update={"template": refusing}), dataset, str(tmp_path))
    assert any(
        "dropped of" in record.message and "template_refused" in record.message
        for record in caplog.records
        if record.levelno == logging.WARNING
    )
    (ledger,) = (tmp_path / "tokens" / "tiny-facts").glob("train-*.dropped.parquet")
    rows = pq.read_table(ledger).to_pylist()
    assert {row["reason"] for row in rows} == {"template_refused"}
    assert all("ZeroDivisionError" in row["detail"] for row in rows)
    manifest = json.loads((tmp_path / "datasets" / "facts" / "manifest.json").read_text())
    assert len(rows) == manifest["num_train"]


def test_what_the_template_does_not_write_is_told(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = tmp_path / "reasoned.jsonl"
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}]
    turns[1]["reasoning_content"] = "It is wet."
    source.write_text(json.dumps({"messages": turns}) + "\n")
    caplog.set_level(logging.INFO)
    one = dataset.model_copy(update={"source": str(source), "held_out_fraction": 0.0})
    assert tokens(target, one, str(tmp_path)).num_samples == 1
    told = [
        record.message for record in caplog.records if "reasoning_not_rendered" in record.message
    ]
    assert len(told) == 1
    assert "dropped.parquet" in told[0]
