"""One evaluation over several benchmark sets: in the summary, the record, table and page."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.decoding.config import TreeConfig
from eagle_core.errors import ConfigError
from eagle_core.evaluation.benchmarks.config import BenchmarkConfig
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig
from flows.evaluate import evaluate_flow
from flows.offline import offline
from flows.reports.rows import evaluate_rows
from flows.reports.run_record import EVALUATION_NAME, REPORT_NAME, RunRecord
from flows.workspace import Workspace
from tests.eagle_core.evaluation.benchmarks.files import write_sets

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.usefixtures("prefect_server", "plots_drawn_once"),
]

TRAINING = TrainingConfig(dtype="float32", draft_vocab_size=300, max_steps=1, batch_tokens=256)


@contextmanager
def lengths_of_trees() -> Iterator[list[int]]:
    """Yield the lengths of text over which the target is asked for trees, as they are asked."""
    lengths: list[int] = []
    require = TargetModel.require_tree

    def recorded(model: TargetModel, num_tokens: int) -> None:
        lengths.append(num_tokens)
        require(model, num_tokens)

    with mock.patch.object(TargetModel, "require_tree", recorded):
        yield lengths


def require_trees_of_every_set(
    target: TargetConfig, dataset: DatasetConfig, evaluation: EvaluationConfig, home: str
) -> None:
    with lengths_of_trees() as lengths:
        trees = evaluate_flow(target, dataset, TRAINING, evaluation, home=home)
    assert lengths[0] == max(lengths)  # of all sets, before the first is decoded
    assert trees.benchmarks is not None
    assert [one.trained.num_prompts for one in trees.benchmarks.sets] == [4, 1, 4]
    assert len(trees.trained.acceptance_by_depth) == 3
    assert trees.trained.matches_plain
    assert dict(evaluate_rows(trees))["drafted"] == "trees of 8 tokens, depth 3, top 2"


def test_a_sweep_reports_every_set_and_turn_and_the_mean(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    home = str(tmp_path / "home")
    paths = write_sets(tmp_path)
    names = ("mt-bench", "humaneval", "speed-bench")
    evaluation = EvaluationConfig(
        benchmarks=tuple(BenchmarkConfig(name=name, path=str(paths[name])) for name in names),
        num_prompts=2,
        num_plain_prompts=1,
        max_new_tokens=6,
        draft_tokens=2,
    )
    summary = offline(
        target, dataset, store, training=TRAINING, evaluation=evaluation, home=home
    ).acceptance
    assert summary is not None
    found = summary.benchmarks
    assert found is not None
    assert [one.name for one in found.sets] == list(names)
    bench, code, speed = found.sets
    assert (bench.num_questions, code.num_questions, speed.num_questions) == (2, 1, 2)
    assert {turn: part.num_prompts for turn, part in bench.by_turn.items()} == {1: 2, 2: 2}
    assert set(bench.by_category) == {"math", "writing"}
    assert {turn: part.num_prompts for turn, part in speed.by_turn.items()} == {1: 2, 2: 1, 3: 1}
    assert speed.num_without_text == 1
    assert code.by_turn == {}
    assert summary.trained.num_prompts == 4 + 1 + 4
    assert summary.trained_by_group == {}
    assert all(one.trained.num_compared == 1 for one in found.sets)
    assert all(one.trained.matches_plain for one in found.sets)
    lengths = [one.trained.acceptance_length for one in found.sets]
    assert found.mean.acceptance_length == pytest.approx(sum(lengths) / 3)

    run_path = Workspace.at(home, target=target.name, dataset=dataset.name).run_path("main")
    record = RunRecord.read(run_path).evaluation
    assert record is not None
    assert record.benchmarks is not None
    read = record.benchmarks.sets
    assert [one.trained.acceptance_length for one in read] == lengths
    assert [list(one.by_turn) for one in read] == [[1, 2], [], [1, 2, 3]]
    assert (run_path / EVALUATION_NAME).exists()
    rows = dict(evaluate_rows(summary))
    assert rows["prompts"] == "9 (mt-bench, humaneval, speed-bench)"
    value = re.compile(
        r"\d\.\d\d tokens per target forward \(95 %: [\d.]+ to [\d.]+\)(, \d\.\d\d at the start)?; "
        r"by depth \d+%  (\d+%|-)"
    )
    for name in ("mt-bench", "mt-bench, turn 2", "mt-bench, math", "mean of 3 sets"):
        assert value.match(rows[name])
    assert rows["speed-bench, not asked"] == "1 without a text in the file"
    assert str(paths["humaneval"]) in rows["humaneval, read from"]
    page = (run_path / REPORT_NAME).read_text()
    assert "Acceptance length on each benchmark set" in page
    assert "mean of 3 sets" in page

    trees = evaluation.model_copy(update={"tree": TreeConfig(depth=3, top_k=2, nodes=8)})
    require_trees_of_every_set(target, dataset, trees, home)

    missing = evaluation.model_copy(
        update={"benchmarks": (BenchmarkConfig(name="gsm8k", path=str(tmp_path / "none.jsonl")),)}
    )
    with pytest.raises(ConfigError, match=r"no file at .*none\.jsonl"):
        evaluate_flow(target, dataset, TRAINING, missing, home=home)


def test_a_missing_file_is_named_before_anything_is_computed(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    lost = BenchmarkConfig(name="gsm8k", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"no file at .*none\.jsonl"):
        offline(
            *(target, dataset, store),
            evaluation=EvaluationConfig(benchmarks=(lost,)),
            home=str(tmp_path / "home"),
        )
    assert not (tmp_path / "home" / "stores").exists()
