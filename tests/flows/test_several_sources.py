"""Several sources in one data set are told apart up to the run's report, and after `regenerate`."""

import json
from pathlib import Path

import pytest
from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.data.manifest import load_manifest
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from flows.bridge.run import RUN_NAME, read_run
from flows.config.store import StoreConfig
from flows.hidden_states import hidden_states
from flows.regenerate import regenerate_flow
from flows.reports.run_page import write_run_page
from flows.reports.run_record import SETTINGS_NAME, TRAINING_NAME, RunRecord
from flows.tasks.prepare import prepare_dataset
from flows.tasks.tokenize import tokenize
from flows.train import train_flow
from flows.workspace import Workspace

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

TRAINING = TrainingConfig(
    dtype="float32", draft_vocab_size=300, max_steps=2, batch_tokens=512, warmup_steps=1
)


def two_sources(folder: Path, *names: str, moved: int = 0) -> DatasetConfig:
    """Return 12 conversations of each of the names; those of later ones are longer.

    The first source has `moved` of the second one's first, and the order is the same.
    """
    lines = [
        json.dumps({"question": f"What is {at}{n}?", "answer": f"It is {n} " * at}) + "\n"
        for at, _ in enumerate(names, start=1)
        for n in range(12)
    ]
    sources = []
    for at, name in enumerate(names):
        path = folder / f"{at}.jsonl"
        first, end = (12 * number + moved * (number == 1) for number in (at, at + 1))
        path.write_text("".join(lines[first:end]))
        sources.append({"name": name, "source": str(path)})
    fields = {"name": "mix", "sources": sources, "held_out_fraction": 0.3, "max_length": 256}
    return DatasetConfig.model_validate(fields)


def test_a_run_counts_by_source_and_a_run_of_before_is_read(
    tmp_path: Path, target: TargetConfig, store: StoreConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = two_sources(tmp_path, "chat", "table")
    hidden_states(target, mix, store, home=str(tmp_path))
    summary = train_flow(target, mix, store, TRAINING, home=str(tmp_path))
    counts = load_manifest(tmp_path / "datasets" / "mix").by_source
    record, run = RunRecord.read(summary.run_path), read_run(summary.run_path)
    assert run is not None
    assert record.settings is not None
    assert record.training is not None
    assert run.coverage_by_source == record.training.coverage_by_source
    assert list(run.coverage_by_source) == ["chat", "table"]
    printed = capsys.readouterr().out
    for name, covered in run.coverage_by_source.items():
        train, held_out = (
            split.by_source[name] for split in (record.settings.train, record.settings.held_out)
        )
        assert covered.num_samples == train.num_samples == counts[name].num_train > 0
        assert held_out.num_samples == counts[name].num_held_out > 0
        assert covered.num_supervised == train.num_supervised
        assert 0 < covered.share <= 1
        assert f"{covered.share:.1%} of {covered.num_supervised:,} supervised tokens" in printed
    for split in (record.settings.train, record.settings.held_out):
        given = split.by_source.values()
        assert sum(one.num_samples for one in given) == split.num_samples
        assert sum(one.num_supervised for one in given) == split.num_supervised
    page = write_run_page(summary.run_path).read_text()
    assert f"{counts['chat'].num_train} samples to train on, with" in page
    assert "of table" in page

    for name in (RUN_NAME, SETTINGS_NAME, TRAINING_NAME):
        path = summary.run_path / name
        written = json.loads(path.read_text())
        written.pop("coverage_by_source", None)
        for split_name in {"train", "held_out"} & written.keys():
            del written[split_name]["by_source"]
        path.write_text(json.dumps(written))
    before = RunRecord.read(summary.run_path)
    assert before.outdated == ()
    assert before.training is not None
    assert "of table" not in write_run_page(summary.run_path).read_text()
    again = train_flow(target, mix, store, TRAINING, home=str(tmp_path))
    assert again.num_steps == summary.num_steps
    assert again.coverage_by_source == {}


def test_renamed_sources_are_counted_by_their_new_names(
    tmp_path: Path, target: TargetConfig
) -> None:
    space = Workspace.at(str(tmp_path), target=target.name, dataset="mix")

    @flow
    def named(*names: str) -> TokenFile:
        mix = two_sources(tmp_path, *names)
        prepare_dataset(mix, space)
        return TokenFile(tokenize(target, mix, space).train_path)

    first, second = named("one", "two"), named("uno", "due")
    assert second.path == first.path
    assert second.sample_ids == first.sample_ids
    assert {name: len(rows) for name, rows in second.rows_by_source().items()} == {
        new: len(rows)
        for new, rows in zip(("uno", "due"), first.rows_by_source().values(), strict=True)
    }


def test_conversations_that_another_source_gives_now_are_counted_for_it(
    tmp_path: Path, target: TargetConfig
) -> None:
    """The data is the same in the same order, so the store is, and no sample is made again."""
    space = Workspace.at(str(tmp_path), target=target.name, dataset="mix")

    @flow
    def moved(number: int) -> list[TokenFile]:
        mix = two_sources(tmp_path, "chat", "table", moved=number)
        prepare_dataset(mix, space)
        tokens = tokenize(target, mix, space)
        return [TokenFile(tokens.train_path), TokenFile(tokens.held_out_path)]

    before = moved(0)
    for number in (7, -2, 0):
        files = moved(number)
        assert [file.path for file in files] == [file.path for file in before]
        assert [file.sample_ids for file in files] == [file.sample_ids for file in before]
        given = load_manifest(space.dataset_path).by_source
        assert [counts.num_records for counts in given.values()] == [12 + number, 12 - number]
        for name, counts in given.items():
            numbers = [len(file.rows_by_source()[name]) for file in files]
            assert numbers == [counts.num_train, counts.num_held_out]
    inodes = [file.path.stat().st_ino for file in files]
    assert [file.path.stat().st_ino for file in moved(0)] == inodes


def test_answers_of_the_target_count_for_the_source_of_their_question(
    tmp_path: Path, target: TargetConfig
) -> None:
    mix = two_sources(tmp_path, "chat", "table")
    settings = RegenerationConfig(max_tokens=6, cut_answers="keep")
    summary = regenerate_flow(target, mix, settings, home=str(tmp_path))
    manifest = load_manifest(summary.path)
    assert {name: counts.num_records for name, counts in manifest.by_source.items()} == {
        "chat": 12,
        "table": 12,
    }
    assert sum(counts.num_train for counts in manifest.by_source.values()) == manifest.num_train
    space = Workspace.at(str(tmp_path), target=target.name, dataset=manifest.name)
    answers = DatasetConfig(name=manifest.name, source="regenerated", max_length=256)

    @flow
    def tokens() -> TokenFile:
        return TokenFile(tokenize(target, answers, space).train_path)

    rows = tokens().rows_by_source()
    assert {name: len(found) for name, found in rows.items()} == {
        name: counts.num_train for name, counts in manifest.by_source.items()
    }
