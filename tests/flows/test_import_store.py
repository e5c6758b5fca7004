"""Dumps of other tools become stores that training reads, with a real target and a real server."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import eagle_core.errors
import storage.errors
from deployments.cli.commands import IMPORT_CHOICES
from deployments.recipe import load_recipe
from eagle_core.data.config import DatasetConfig
from eagle_core.dumps.formats import FORMATS
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.bridge.import_journal import sole_import
from flows.bridge.stored_source import StoredSource
from flows.config.store import StoreConfig
from flows.errors import RunBusyError
from flows.hidden_states import hidden_states
from flows.import_store import import_store
from flows.summaries import ImportSummary
from flows.train import train_flow
from flows.verify import verify_flow
from storage.maintenance.verify import verify_store
from storage.records.plan import PlannedShard
from storage.samples import last_needed
from storage.store import Store
from storage.writer import ShardWriter
from tests import dumped, tiny
from tests.deployments.cli.terminal import eyas_here
from tests.flows.trees import digests
from tests.paths import ROOT
from tests.waiting import wait_for

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

NUM_ROWS = 12


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def dumped_rows(tiny_target_path: Path) -> list[dumped.Row]:
    """Twelve conversations with the tiny target's states."""
    target = TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")
    return dumped.rows(target, dumped.tokenized(target, NUM_ROWS))


@pytest.fixture
def dataset() -> DatasetConfig:
    """What a recipe says about the imported data set; its own source is not read."""
    return DatasetConfig(name="facts", source="none", held_out_fraction=0.2, max_length=256)


def _import(
    path: Path, home: Path, target: TargetConfig, dataset: DatasetConfig, **more: Any
) -> ImportSummary:
    given = {"format": "specforge", "store": StoreConfig(shard_tokens=300)} | more
    return import_store(target=target, dataset=dataset, path=str(path), home=str(home), **given)


def _ledger(summary: ImportSummary) -> list[dict[str, str]]:
    found: list[dict[str, str]] = pq.read_table(summary.ledger_path).to_pylist()
    return found


def _ids(rows: Sequence[dumped.Row]) -> set[str]:
    return {row.own.sample_id for row in rows}


def test_an_import_gives_the_store_that_hidden_states_would_have_made(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    """Same samples, same bits, same identity; verified with the target; `train` trains on it."""
    dumped.write_specforge(tmp_path / "dump", dumped_rows, padding=5)
    summary = _import(tmp_path / "dump", tmp_path, target, dataset)
    assert (summary.num_rows, summary.num_imported, summary.dropped) == (NUM_ROWS, NUM_ROWS, {})
    assert summary.changed == {"padding_cut": NUM_ROWS}
    assert summary.num_checked == 4
    assert summary.largest_error < 0.05
    opened = Store.open(summary.states.store_root)
    assert summary.states.num_shards == summary.states.shards_made > 2
    assert verify_store(opened, deep=True) == []
    train = opened.snapshot()
    held_out = opened.refs.get("facts-held_out")
    assert held_out is not None
    members = [train, opened.snapshot(held_out)]
    assert {name.hex() for one in members for name in one.members} == _ids(dumped_rows)
    source = StoredSource(opened.reader(train), None)
    own = {row.own.sample_id: row.own for row in dumped_rows}
    for index in range(train.num_samples):
        found = source.fetch(index)
        expected = own[found.sample_id]
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert np.array_equal(found.aux_hidden_states, expected.aux_hidden_states)
        present = found.last_hidden_state.any(axis=1)
        assert present[last_needed(expected.loss_mask)].all()
        assert np.array_equal(found.last_hidden_state[present], expected.last_hidden_state[present])

    settings: dict[str, Any] = {
        "target": target,
        "dataset": summary.dataset,
        "store": StoreConfig(shard_tokens=300),
        "home": str(tmp_path),
    }
    verify_flow(**settings)
    training = TrainingConfig(draft_vocab_size=200, max_steps=3, batch_tokens=256, ttt_length=2)
    trained = train_flow(**settings, training=training)
    assert trained.num_steps == 3
    assert trained.source_id == train.snapshot_id
    states = hidden_states(**settings)
    assert states.shards_made == 0
    assert states.snapshot_id == train.snapshot_id


def test_what_is_damaged_is_listed_and_the_rest_is_imported(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    paths = dumped.write_specforge(tmp_path / "dump", dumped_rows)
    paths[1].write_bytes(paths[1].read_bytes()[:-50])
    document = torch.load(paths[4], weights_only=True)
    document["aux_hidden_state"][0, 3] = torch.nan
    torch.save(document, paths[4])
    document = torch.load(paths[5], weights_only=True)
    document["hidden_state"][:] = 0
    torch.save(document, paths[5])
    shutil.copy(paths[6], paths[7])
    torch.save({"input_ids": _Code(tmp_path / "ran")}, paths[8])
    (tmp_path / "dump" / "notes.txt").write_text("not a row")
    summary = _import(tmp_path / "dump", tmp_path, target, dataset)
    assert summary.dropped == {
        "bad_states": 2,
        "duplicate": 1,
        "forbidden_pickle": 1,
        "unreadable": 1,
    }
    assert summary.num_imported == NUM_ROWS - 5
    entries = {entry["location"]: entry for entry in _ledger(summary)}
    assert set(entries) == {str(paths[number]) for number in (1, 4, 5, 7, 8)}
    nan = entries[str(paths[4])]
    assert nan["reason"] == "bad_states"
    assert "NaN or infinite at position 3 (1 of" in nan["detail"]
    assert "last_hidden_state is all zero" in entries[str(paths[5])]["detail"]
    assert not (tmp_path / "ran").exists()
    # Mended files are added; nothing else is read or written again.
    before = digests(Path(summary.states.store_root) / "shards")
    dumped.write_specforge(tmp_path / "dump", dumped_rows)
    again = _import(tmp_path / "dump", tmp_path, target, dataset)
    assert (again.num_imported, again.num_before) == (5, NUM_ROWS - 5)
    assert again.dropped == {}
    after = digests(Path(summary.states.store_root) / "shards")
    assert before.items() <= after.items()
    opened = Store.open(again.states.store_root)
    assert opened.commits().held(_ids(dumped_rows)) == _ids(dumped_rows)


def test_an_interrupted_import_goes_on_where_it_stopped(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    dumped_rows: list[dumped.Row],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dumped.write_specforge(tmp_path / "dump", dumped_rows)
    whole = _import(tmp_path / "dump", tmp_path / "whole", target, dataset)
    written = 0
    write = ShardWriter.write

    def fail_at_third(self: ShardWriter, *given: Any) -> Any:
        nonlocal written
        written += 1
        if written == 3:
            raise storage.errors.OutOfSpaceError("full")
        return write(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", fail_at_third)
        with pytest.raises(storage.errors.OutOfSpaceError):
            _import(tmp_path / "dump", tmp_path / "cut", target, dataset)
    opened = Store.open(str(tmp_path / "cut" / "stores" / "tiny-facts"))
    assert len(opened.shard_ids()) == 2
    assert opened.snapshot_ids() == []
    resumed = _import(tmp_path / "dump", tmp_path / "cut", target, dataset)
    assert resumed.num_before > 0
    assert resumed.num_before + resumed.num_imported == NUM_ROWS
    assert resumed.states.snapshot_id == whole.states.snapshot_id
    assert opened.shard_ids() == Store.open(whole.states.store_root).shard_ids()


def test_states_of_something_else_are_named_before_anything_is_written(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    target: TargetConfig,
    dataset: DatasetConfig,
    dumped_rows: list[dumped.Row],
) -> None:
    dumped.write_specforge(tmp_path / "dump", dumped_rows)
    layers = target.model_copy(update={"aux_layers": (1, 3, 6)})
    with pytest.raises(
        eagle_core.errors.MismatchError, match=r"nearest to those of layers \[1, 3, 4\], not of"
    ):
        _import(tmp_path / "dump", tmp_path, layers, dataset)
    other_path = tiny.write_target(tmp_path_factory.mktemp("other"), seed=7)
    other = target.model_copy(update={"model": str(other_path)})
    with pytest.raises(eagle_core.errors.MismatchError, match="states are not the target's"):
        _import(tmp_path / "dump", tmp_path, other, dataset)
    for path in (tmp_path / "dump").rglob("*.ckpt"):
        document = torch.load(path, weights_only=True)
        document["aux_hidden_state"] = document["aux_hidden_state"][..., :128]
        torch.save(document, path)
    with pytest.raises(
        eagle_core.errors.MismatchError, match=r"none of 12 rows .* fits target tiny"
    ):
        _import(tmp_path / "dump", tmp_path, target, dataset)
    assert not (tmp_path / "stores").exists()
    assert not (tmp_path / "imports").exists()


def test_a_dump_with_no_sound_row_is_an_error_that_names_the_ledger(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    for path in dumped.write_specforge(tmp_path / "dump", dumped_rows[:3]):
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(eagle_core.errors.CorruptError, match=r"none of the 3 rows .*3 unreadable"):
        _import(tmp_path / "dump", tmp_path, target, dataset)
    assert (tmp_path / "imports" / "tiny-facts" / "ledger.parquet").exists()


def test_rows_of_answers_and_caches_without_last_states_are_imported(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    paths = dumped.write_speculators(tmp_path / "rows", dumped_rows)
    by_row = _import(
        tmp_path / "rows",
        tmp_path / "a",
        target,
        dataset,
        format="speculators",
        check_every_row=True,
    )
    assert by_row.num_imported == NUM_ROWS
    assert by_row.dropped == {"contained": len(paths) - NUM_ROWS}
    again = _import(
        tmp_path / "rows",
        tmp_path / "a",
        target,
        dataset,
        format="speculators",
        check_every_row=True,
    )
    assert (again.num_imported, again.num_before) == (0, NUM_ROWS)
    assert again.dropped == by_row.dropped
    dumped.write_nemo(tmp_path / "cache", dumped_rows, aux_layers=(1, 3, 4))
    cached = _import(
        tmp_path / "cache", tmp_path / "b", target, dataset, format="nemo", num_checked=0
    )
    assert (cached.num_imported, cached.num_checked) == (NUM_ROWS, 0)
    opened = Store.open(cached.states.store_root)
    assert opened.commits().held(_ids(dumped_rows)) == _ids(dumped_rows)
    dumped.write_nemo(tmp_path / "cache", dumped_rows, aux_layers=(1, 2, 3))
    with pytest.raises(eagle_core.errors.MismatchError, match=r"aux_layers=\[1, 2, 3\]"):
        _import(tmp_path / "cache", tmp_path / "b", target, dataset, format="nemo")


def test_a_second_dump_is_added_and_other_settings_are_refused(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    """Also if its files have the names of the first one's."""
    dumped.write_specforge(tmp_path / "one", dumped_rows[:6])
    dumped.write_specforge(tmp_path / "two", dumped_rows[5:])
    _import(tmp_path / "one", tmp_path, target, dataset)
    both = _import(tmp_path / "two", tmp_path, target, dataset)
    assert (both.num_imported, both.num_before) == (NUM_ROWS - 6, 0)
    assert both.dropped == {"duplicate": 1}
    assert both.states.num_samples == NUM_ROWS
    shorter = dataset.model_copy(update={"max_length": 100})
    with pytest.raises(eagle_core.errors.MismatchError, match="max_length was 256, is 100"):
        _import(tmp_path / "two", tmp_path, target, shorter)


def test_a_checked_row_that_is_not_the_target_s_is_left_out(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    paths = dumped.write_specforge(tmp_path / "dump", dumped_rows)
    document = torch.load(paths[0], weights_only=True)
    document["aux_hidden_state"] = document["aux_hidden_state"].flip(1)
    torch.save(document, paths[0])
    summary = _import(tmp_path / "dump", tmp_path, target, dataset)
    assert summary.dropped == {"not_reproduced": 1}
    (entry,) = _ledger(summary)
    assert entry["location"] == str(paths[0])
    assert summary.num_imported == NUM_ROWS - 1


def test_states_that_the_store_has_are_not_written_again(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    shared = StoreConfig(root=str(tmp_path / "shared"), shard_tokens=300)
    dumped.write_specforge(tmp_path / "dump", dumped_rows)
    first = _import(tmp_path / "dump", tmp_path, target, dataset, store=shared)
    other = dataset.model_copy(update={"name": "other"})
    second = _import(tmp_path / "dump", tmp_path, target, other, store=shared)
    assert (second.num_imported, second.states.shards_made) == (NUM_ROWS, 0)
    assert second.states.snapshot_id == first.states.snapshot_id


def test_what_cannot_be_done_is_refused_with_the_remedy(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    dumped.write_speculators(tmp_path / "rows", dumped_rows[:2], with_dataset=False)
    with pytest.raises(ConfigError, match="--mask template"):
        _import(tmp_path / "rows", tmp_path, target, dataset, format="speculators")
    with pytest.raises(ConfigError, match=r"store\.recompute=false"):
        _import(tmp_path, tmp_path, target, dataset, store=StoreConfig(recompute=True))
    with sole_import(tmp_path / "imports" / "tiny-facts"):
        dumped.write_specforge(tmp_path / "dump", dumped_rows[:2])
        with pytest.raises(RunBusyError, match="another process imports"):
            _import(tmp_path / "dump", tmp_path, target, dataset)


def _change(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    document = torch.load(path, weights_only=True)
    change(document)
    torch.save(document, path)


def _swap(document: dict[str, torch.Tensor]) -> None:
    document["aux_hidden_state"] = document["aux_hidden_state"].flip(1)


def _spoil(document: dict[str, torch.Tensor]) -> None:
    document["hidden_state"][:] = 0


def test_rows_of_another_target_behind_damaged_ones_are_not_imported_unchecked(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    paths = dumped.write_specforge(tmp_path / "dump", dumped_rows * 2)
    sound = paths[1]  # the last to be tried
    for path in paths:
        _change(path, _swap if path == sound else _spoil)
    with pytest.raises(eagle_core.errors.MismatchError, match=f"1 of 1 checked rows: {sound}"):
        _import(tmp_path / "dump", tmp_path, target, dataset)


def test_half_of_the_checked_rows_being_wrong_is_an_error(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    for path in dumped.write_specforge(tmp_path / "dump", dumped_rows)[::2]:
        _change(path, _swap)
    with pytest.raises(eagle_core.errors.MismatchError, match="6 of 12 checked rows"):
        _import(tmp_path / "dump", tmp_path, target, dataset, num_checked=40)


def test_one_wrong_row_has_every_row_checked_and_stays_refused(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    paths = dumped.write_specforge(tmp_path / "dump", dumped_rows)
    for number in (0, 1):
        _change(paths[number], _swap)
    first = _import(tmp_path / "dump", tmp_path, target, dataset)
    assert first.dropped == {"not_reproduced": 2}
    again = _import(tmp_path / "dump", tmp_path, target, dataset, num_checked=0)
    assert (again.num_before, again.num_imported) == (NUM_ROWS - 2, 0)
    assert again.dropped == {"not_reproduced": 2}
    for number in (0, 1):
        _change(paths[number], _swap)  # back
    mended = _import(tmp_path / "dump", tmp_path, target, dataset, num_checked=0)
    assert (mended.num_imported, mended.dropped) == (2, {})


def test_another_check_or_store_for_the_same_name_is_refused(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    """Nothing of the first import is lost."""
    dumped.write_specforge(tmp_path / "dump", dumped_rows)
    _import(tmp_path / "dump", tmp_path, target, dataset)
    before = digests(tmp_path / "imports" / "tiny-facts" / "journal")
    with pytest.raises(eagle_core.errors.MismatchError, match="check_every_row was False, is True"):
        _import(tmp_path / "dump", tmp_path, target, dataset, check_every_row=True)
    elsewhere = StoreConfig(root=str(tmp_path / "elsewhere"))
    with pytest.raises(eagle_core.errors.MismatchError, match=r"store\.root was None, is"):
        _import(tmp_path / "dump", tmp_path, target, dataset, store=elsewhere)
    other = target.model_copy(update={"name": "other"})
    assert _import(tmp_path / "dump", tmp_path, other, dataset).num_imported == NUM_ROWS
    assert digests(tmp_path / "imports" / "tiny-facts" / "journal") == before


def test_a_file_that_was_replaced_is_noticed_and_a_copy_is_not(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    paths = dumped.write_specforge(tmp_path / "dump", dumped_rows)
    _import(tmp_path / "dump", tmp_path, target, dataset)
    os.utime(paths[2])
    assert _import(tmp_path / "dump", tmp_path, target, dataset).num_before == NUM_ROWS
    torch.save(dumped.specforge_document(dumped_rows[4]), paths[3])
    with pytest.raises(eagle_core.errors.MismatchError, match=f"{paths[3]} was imported, and has"):
        _import(tmp_path / "dump", tmp_path, target, dataset)


def test_a_dump_that_was_moved_gives_no_new_rows(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    paths = dumped.write_speculators(tmp_path / "rows", dumped_rows)
    _import(tmp_path / "rows", tmp_path, target, dataset, format="speculators")
    (tmp_path / "rows").rename(tmp_path / "moved")
    again = _import(tmp_path / "moved", tmp_path, target, dataset, format="speculators")
    assert again.num_imported == 0
    assert again.dropped == {"duplicate": NUM_ROWS, "contained": len(paths) - NUM_ROWS}


def test_every_shard_is_planned_before_it_is_written(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    dumped_rows: list[dumped.Row],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else garbage collection would take those of an interrupted import, if there is a snapshot."""
    dumped.write_specforge(tmp_path / "dump", dumped_rows)
    unplanned: list[str] = []
    write = Store.write_shard

    def checked(self: Store, shard: PlannedShard, *given: Any, **more: Any) -> Any:
        plans = self.plans.all()
        assert len(plans) == 1
        if shard not in plans[0].shards:
            unplanned.append(shard.shard_id)
        return write(self, shard, *given, **more)

    monkeypatch.setattr(Store, "write_shard", checked)
    _import(tmp_path / "dump", tmp_path, target, dataset)
    assert unplanned == []


def test_rows_without_masks_are_an_error_that_names_the_option(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, dumped_rows: list[dumped.Row]
) -> None:
    dumped.write_model_optimizer(tmp_path / "dump", dumped_rows, with_mask=False)
    given: dict[str, Any] = {"format": "model-optimizer"}
    with pytest.raises(ConfigError, match=r"none of 12 rows .* loss mask.*--mask template"):
        _import(tmp_path / "dump", tmp_path, target, dataset, **given)


def test_a_cache_of_fewer_rows_than_its_manifest_says_is_warned_of(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    dumped_rows: list[dumped.Row],
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths = dumped.write_nemo(tmp_path / "cache", dumped_rows, aux_layers=(1, 3, 4))
    paths[1].unlink()
    summary = _import(tmp_path / "cache", tmp_path, target, dataset, format="nemo", num_checked=0)
    assert summary.num_imported == NUM_ROWS - 4
    assert "says that it has 12 rows, and 8 are there" in caplog.text


def test_an_import_that_was_killed_goes_on_where_it_stopped(
    tmp_path: Path, tiny_target_path: Path, dumped_rows: list[dumped.Row]
) -> None:
    dumped.write_specforge(tmp_path / "dump", dumped_rows)
    recipe = {
        "target": {"name": "tiny", "model": str(tiny_target_path), "dtype": "float32"},
        "dataset": {"name": "chat", "source": "preset:ultrachat", "max_length": 256},
        "store": {"shard_tokens": 50},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    given = ("import-store", "specforge", str(tmp_path / "dump"), str(tmp_path / "mine.yaml"))
    command = [sys.executable, "-m", "deployments", *given, "--home", str(tmp_path / "home")]
    journal = tmp_path / "home" / "imports" / "tiny-specforge" / "journal"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as running:
        wait_for(
            lambda: len(list(journal.glob("*.arrow"))) > 1 or running.poll() is not None,
            what="the second shard",
            every_seconds=0.002,
        )
        running.send_signal(signal.SIGKILL)
    opened = Store.open(str(tmp_path / "home" / "stores" / "tiny-specforge"))
    assert 0 < len(opened.shard_ids()) < NUM_ROWS
    assert eyas_here(*given, "--home", str(tmp_path / "home")).returncode == 0
    assert eyas_here(*given, "--home", str(tmp_path / "whole")).returncode == 0
    whole = Store.open(str(tmp_path / "whole" / "stores" / "tiny-specforge"))
    assert opened.snapshot().snapshot_id == whole.snapshot().snapshot_id
    assert opened.shard_ids() == whole.shard_ids()


def test_the_name_of_the_data_set_can_be_an_override(
    tmp_path: Path, tiny_target_path: Path, dumped_rows: list[dumped.Row]
) -> None:
    dumped.write_specforge(tmp_path / "dump", dumped_rows)
    recipe = {
        "target": {"name": "tiny", "model": str(tiny_target_path), "dtype": "float32"},
        "dataset": {"name": "chat", "source": "preset:ultrachat", "max_length": 256},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    given = ("specforge", str(tmp_path / "dump"), str(tmp_path / "mine.yaml"))
    home = tmp_path / "home"
    ended = eyas_here(
        "import-store", *given, "--home", str(home), "--set", "dataset.name=own", "--check", "0"
    )
    assert ended.returncode == 0, ended.stderr
    assert load_recipe(str(home / "imports" / "tiny-own" / "recipe.yaml")).dataset.name == "own"


def test_the_command_ends_with_a_recipe_to_train_with(
    tmp_path: Path,
    tiny_target_path: Path,
    dumped_rows: list[dumped.Row],
) -> None:
    dumped.write_model_optimizer(tmp_path / "dump", dumped_rows)
    recipe = {
        "target": {"name": "tiny", "model": str(tiny_target_path), "dtype": "float32"},
        "dataset": {"name": "chat", "source": "preset:ultrachat", "max_length": 256},
        "store": {"shard_tokens": 300},
        "training": {"draft_vocab_size": 200},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    given = ("model-optimizer", str(tmp_path / "dump"), str(tmp_path / "mine.yaml"))
    home = ("--home", str(tmp_path / "home"))
    ended = eyas_here("import-store", *given, *home, "--set", "training.max_steps=2")
    assert ended.returncode == 0, ended.stderr
    written = tmp_path / "home" / "imports" / "tiny-model-optimizer" / "recipe.yaml"
    assert f"eyas run train {written}" in ended.stdout
    loaded = load_recipe(str(written))
    assert loaded.dataset.name == "model-optimizer"
    assert loaded.training.max_steps == 2
    assert loaded.training.draft_vocab_size == 200
    assert loaded.store.shard_tokens == 300
    ended = eyas_here("import-store", "spec-forge", *given[1:], *home)
    assert ended.returncode == 1
    assert "no format 'spec-forge'; known: specforge, speculators" in ended.stderr


def test_the_command_knows_every_format() -> None:
    assert set(IMPORT_CHOICES["format"]) == set(FORMATS)
