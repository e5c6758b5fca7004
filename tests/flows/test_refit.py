"""A draft that was trained on some aux layers goes on with the states of others."""

import json
from pathlib import Path

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import MismatchError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.config.export import RunExportConfig
from flows.config.store import StoreConfig
from flows.export import export_flow
from flows.hidden_states import hidden_states
from flows.offline import offline
from flows.online import online
from flows.reports.rows import train_rows
from flows.train import train_flow
from flows.workspace import Workspace

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

TRAINING = TrainingConfig(dtype="float32", draft_vocab_size=300, max_steps=1, batch_tokens=256)
SHORT = EvaluationConfig(num_prompts=1, num_plain_prompts=0, max_new_tokens=2, draft_tokens=2)


def test_a_draft_of_other_layers_is_refit_or_refused_before_any_states_are_made(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    home, there = str(tmp_path / "home"), str(tmp_path / "other")
    hidden_states(target, dataset, store, home=home)
    solved = train_flow(target, dataset, store, TRAINING, home=home).start
    export = RunExportConfig(dtype="float32", layouts=("serving",))
    (exported,) = export_flow(target, dataset, TRAINING, export, home=home).layouts
    given = TRAINING.model_copy(update={"start": str(exported.path)})
    assert solved is not None

    others = target.model_copy(update={"aux_layers": (0, 2, 4)})
    with pytest.raises(MismatchError, match=r"layers \(1, 3, 4\).*\(0, 2, 4\).*training\.refit=tr"):
        offline(others, dataset, store, training=given, home=there)
    space = Workspace(home=Path(there), target=target.name, dataset=dataset.name)
    assert not Path(space.store_root).exists()

    refit = given.model_copy(update={"refit": True})
    config_path = exported.path / "config.json"
    config = config_path.read_text()
    document = json.loads(config)
    document["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [4, 1, 3]
    config_path.write_text(json.dumps(document))
    with pytest.raises(MismatchError, match=r"names the aux layers \(4, 1, 3\); expected three of"):
        offline(others, dataset, store, training=refit, home=there)
    config_path.write_text(config)
    hidden_states(others, dataset, store, home=there)
    found = train_flow(others, dataset, store, refit, home=there)
    assert found.start is not None
    assert found.start.refit_from == (1, 3, 4)
    assert 0 < found.start.misfit < 0.1
    assert found.start.acceptance_length > 1 + 0.8 * (solved.acceptance_length - 1)
    assert "refit from aux layers 1, 3, 4 (misfit " in dict(train_rows(found))["start"]

    computed = online(
        others, dataset, store, refit, evaluation=SHORT, home=there, run="online"
    ).training
    assert computed.start is not None
    assert computed.start.refit_from == (1, 3, 4)
    assert not computed.start.is_held_out
    assert computed.start.acceptance_length > 1.1
