"""`plan` for a target whose weights are not here."""

import shutil
from pathlib import Path

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.weights import weight_files
from flows.config.store import StoreConfig
from flows.hidden_states import hidden_states
from flows.plan import plan
from flows.reports.store_tables import cost_rows

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


def test_it_is_estimated_from_its_description(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    measured = plan(target=target, dataset=dataset, store=store, home=str(tmp_path / "a"))
    folder = tmp_path / "described"
    shutil.copytree(target.model, folder)
    for path in weight_files(folder):
        path.unlink()
    described = target.model_copy(update={"model": str(folder)})
    found = plan(target=described, dataset=dataset, store=store, home=str(tmp_path / "b"))
    assert found.is_sketch
    assert not measured.is_sketch
    assert found.missing_tokens == measured.missing_tokens
    assert found.num_shards == measured.num_shards
    assert found.bytes_per_token.keys() == measured.bytes_per_token.keys()
    for name, expected in measured.bytes_per_token.items():
        # A tiny target's shards are small: their headers and dictionaries weigh more.
        assert 0.5 < found.bytes_per_token[name] / expected < 1.2
    rows = dict(cost_rows(found))
    assert rows["weights"].startswith("not here: sizes are from config.json")
    assert rows["placement"].startswith("whole")
    assert found.tokens_per_second > 0
    with pytest.raises(ConfigError, match="hf download"):
        hidden_states(target=described, dataset=dataset, store=store, home=str(tmp_path / "b"))
