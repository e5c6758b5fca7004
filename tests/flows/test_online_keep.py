"""Online training that keeps its states: computed once, and the losses of one that forgets them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eagle_core.atomic_files import file_digest
from eagle_core.data.config import DatasetConfig
from eagle_core.errors import MismatchError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig
from flows.online import online
from flows.reports.run_page import read_curves
from flows.reports.run_record import RunRecord
from flows.tasks.prepare import prepare
from flows.workspace import Workspace
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests import tiny

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

TRAINING = TrainingConfig(
    dtype="float32",
    draft_vocab_size=300,
    epochs=2,
    batch_tokens=512,
    warmup_steps=2,
    log_every=1,
    shuffle_window=2,
)
SHORT = EvaluationConfig(num_prompts=1, num_plain_prompts=0, max_new_tokens=2, draft_tokens=2)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the samples that the target computed, in order."""
    found: list[str] = []

    def counted(
        target: TargetModel, samples: list[TokenizedSample], **options: Any
    ) -> Iterator[HiddenStateSample]:
        found.extend(sample.sample_id for sample in samples)
        return capture_states(target, samples, **options)

    monkeypatch.setattr("flows.bridge.online_source.capture_states", counted)
    return found


def test_states_are_computed_once_and_the_losses_are_those_of_forgetting(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
    computed: list[str],
) -> None:
    space = Workspace(home=tmp_path, target=target.name, dataset=dataset.name)

    def losses(run: str, *, keep: bool) -> tuple[list[float], str]:
        summary = online(
            target,
            dataset,
            store.model_copy(update={"keep": keep}),
            TRAINING,
            evaluation=SHORT,
            home=str(tmp_path),
            run=run,
        ).training
        curve = read_curves(summary.run_path)["loss"]
        newest = max(summary.run_path.glob("checkpoints/step-*"))
        return list(curve.y), file_digest(newest / "draft.safetensors")

    forgetting = losses("forgets", keep=False)
    assert not space.store_root.exists()
    assert len(forgetting[0]) > 8
    (train_path,) = space.tokens_path.glob("train-*.arrow")
    wanted = sorted(TokenFile(train_path).sample_ids)
    assert len(computed) > len(wanted)
    computed.clear()

    assert losses("keeps", keep=True) == forgetting
    assert sorted(computed) == wanted
    computed.clear()
    kept = Store.open(str(space.store_root))
    assert verify_store(kept, deep=True) == []
    assert sorted(map(kept.snapshot().sample_id, range(len(wanted)))) == wanted
    assert all(commit.probe for commit in kept.commits().values())
    assert kept.plans.unfinished() == []
    settings = RunRecord.read(space.run_path("keeps")).settings
    assert settings is not None
    assert settings.storage_size is not None
    assert 0 < settings.storage_size.stored_bytes < settings.storage_size.raw_bytes

    first = min(kept.commits())
    num_lost = len(kept.commit(first).sample_ids)
    kept.revoke(first)  # as if the run had been killed before this one
    assert losses("goes-on", keep=True) == forgetting
    assert len(computed) == num_lost
    computed.clear()

    assert losses("reads", keep=True) == forgetting
    assert computed == []

    other = dataset.model_copy(update={"held_out_fraction": 0.5})
    with pytest.raises(MismatchError, match="has done its steps, and data set facts or its sett"):
        online(target, other, store, TRAINING, home=str(tmp_path), run="forgets")


def test_an_unfinished_run_notices_that_its_data_set_has_changed(
    tmp_path: Path, target: TargetConfig, store: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny.write_conversations(tmp_path / "facts.json", 20)
    dataset = DatasetConfig(name="facts", source=str(source), held_out_fraction=0.2, max_length=256)

    def go_on(steps: int) -> int:
        training = TRAINING.model_copy(update={"max_steps": steps, "extend": "keep"})
        return online(
            target, dataset, store, training, evaluation=SHORT, home=str(tmp_path), run="main"
        ).training.num_steps

    assert go_on(1) == 1
    own = sorted((tmp_path / "tokens").rglob("*.arrow"))
    tiny.write_conversations(source, 30)  # ten more
    prepare(target, dataset, str(tmp_path))
    caplog.clear()
    assert go_on(2) == 2
    assert "it continues with its own data" in caplog.text
    (train,) = (path for path in own if path.name.startswith("train"))
    assert f"of its {len(TokenFile(train))} samples" in caplog.text

    tiny.write_conversations(source, 6)  # few of the same
    prepare(target, dataset, str(tmp_path))
    assert go_on(3) == 3

    tiny.write_conversations(source, 20, first=100)  # others
    prepare(target, dataset, str(tmp_path))
    with pytest.raises(MismatchError, match=r"has 0 of its \d+ samples\. If the data was replaced"):
        go_on(4)
