"""The whole pipeline in one flow."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target import tokenizer
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.bridge import passed_checks
from flows.config.store import StoreConfig
from flows.offline import offline

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

TRAINING = TrainingConfig(dtype="float32", draft_vocab_size=300, max_steps=1, batch_tokens=256)
EVALUATION = EvaluationConfig(num_prompts=1, max_new_tokens=4)


@pytest.fixture
def own(tmp_path: Path, target: TargetConfig) -> TargetConfig:
    """A copy of the tiny target, of which this process has read nothing."""
    folder = shutil.copytree(target.model, tmp_path / "target")
    return target.model_copy(update={"model": str(folder)})


def counted(made: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        made.append(name)
        return function(*arguments, **named)

    return call


def test_the_stages_share_the_check_and_the_tokenizer(
    tmp_path: Path,
    own: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    for module, name in ((tokenizer, "ConversationTokenizer"), (passed_checks, "check_target")):
        monkeypatch.setattr(module, name, counted(made, name, getattr(module, name)))
    summary = offline(
        own, dataset, store, training=TRAINING, evaluation=EVALUATION, home=str(tmp_path / "home")
    )
    assert summary.training.num_steps == 1
    assert summary.acceptance is not None
    assert summary.acceptance.trained.num_prompts == 1
    assert summary.training.start is not None
    assert not summary.training.start.is_drawn
    assert summary.acceptance.untrained.acceptance_length > 1  # it is the solved draft
    assert sorted(made) == ["ConversationTokenizer", "check_target"]
