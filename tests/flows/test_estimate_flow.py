"""The estimate flow: what the store says must be what the target's own states say."""

import json
from pathlib import Path

import numpy as np
import pytest
from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.estimate import AcceptanceEstimate, estimate_acceptance
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_setup import load_trained, set_up_draft
from flows.bridge.online_source import OnlineSource
from flows.config.store import StoreConfig
from flows.estimate import estimate_flow
from flows.export import export_flow
from flows.hidden_states import hidden_states
from flows.reports import rows as report
from flows.tasks.prepare import prepare
from flows.train import train_flow

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

TRAINING = TrainingConfig(
    dtype="float32", draft_vocab_size=300, max_steps=30, batch_tokens=512, warmup_steps=2
)
EVALUATION = EvaluationConfig(draft_tokens=3, num_prompts=100)


@flow
def by_the_target(target: TargetConfig, dataset: DatasetConfig, home: str) -> AcceptanceEstimate:
    """Estimate from states that the target computes now, without any store."""
    space, tokens = prepare(target, dataset, home)
    run_path = space.run_path("main")
    setup = set_up_draft(target, TRAINING, run_path)
    draft: DraftModel = load_trained(setup)
    source = OnlineSource(
        lambda: TargetModel.load(target),
        TokenFile(tokens.held_out_path),
        group_tokens=600,
        groups_kept=100,
        target_fingerprint="f",
    )
    return estimate_acceptance(draft, source, draft_tokens=3, num_samples=100)


def test_the_store_says_what_the_target_says_and_the_target_is_not_loaded(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = str(tmp_path)
    hidden_states(target, dataset, store, home=home)
    printed = capsys.readouterr().out
    for told in ("bytes per token, stored", str(tmp_path / "stores"), "eyas run train RECIPE"):
        assert told in printed
    train_flow(target, dataset, store, TRAINING, home=home)
    printed = capsys.readouterr().out
    for told in ("held-out length, joint prefix", "report.html", "eyas run evaluate RECIPE"):
        assert told in printed
    expected = by_the_target(target, dataset, home)
    monkeypatch.delattr(TargetModel, "load")
    monkeypatch.delattr("flows.tasks.prepare.build_dataset")  # the run knows what it needs
    summary = estimate_flow(target, dataset, store, TRAINING, EVALUATION, home=home)
    found = summary.estimate
    assert summary.checkpoint_step == 30
    assert (found.num_samples, found.num_rounds) == (expected.num_samples, expected.num_rounds)
    assert found.num_samples > 3
    np.testing.assert_array_equal(found.acceptance_by_depth, expected.acceptance_by_depth)
    assert found.acceptance_by_depth[0] > 0.05  # the draft has learnt something to estimate
    assert found.acceptance_length == expected.acceptance_length
    assert found.on_policy == pytest.approx(expected.on_policy)

    path = tmp_path / "runs" / "tiny-facts-main" / "estimate.json"
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["estimate"]["acceptance_length"] == found.acceptance_length
    assert written["snapshot_id"] == summary.snapshot_id

    fewer = EVALUATION.model_copy(update={"num_prompts": 2, "draft_tokens": 2})
    small = estimate_flow(target, dataset, store, TRAINING, fewer, home=home).estimate
    assert small.num_samples == len(small.acceptance_by_depth) == 2

    other = TemplateConfig(last_turn_only=True)
    with pytest.raises(MismatchError, match=r"run\.json was .* other settings \(template"):
        estimate_flow(target.model_copy(update={"template": other}), dataset, store, home=home)
    exported = export_flow(target.model_copy(update={"dtype": "bfloat16"}), dataset, home=home)
    assert exported.checkpoint_step == 30, "a draft serves a target in any arithmetic"

    rows = dict(report.estimate_rows(summary))
    low, high = found.acceptance_interval
    length = f"{found.acceptance_length:.2f} tokens per target forward"
    assert rows["acceptance length, estimated"] == f"{length} (95 %: {low:.2f} to {high:.2f})"
    assert low <= found.acceptance_length <= high
    assert rows["accepted at depth 1, if reached"] == f"{found.acceptance_by_depth[0]:.1%}"


def test_what_is_missing_is_named(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    with pytest.raises(ConfigError, match="no checkpoint yet; run the train flow first"):
        estimate_flow(target, dataset, store, TRAINING, EVALUATION, home=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_nothing_held_out_is_named(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    whole = dataset.model_copy(update={"held_out_fraction": 0.0})
    few = TRAINING.model_copy(update={"max_steps": 1})
    hidden_states(target, whole, store, home=str(tmp_path))
    train_flow(target, whole, store, few, home=str(tmp_path))
    with pytest.raises(ConfigError, match=r"set dataset\.held_out_fraction above 0"):
        estimate_flow(target, whole, store, few, EVALUATION, home=str(tmp_path))
