"""`plan` compares candidates with a real target, whether or not states are stored."""

import re
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from flows.plan import plan
from flows.tasks.candidates import eagle3_layers
from tests import tiny

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


def test_plan_compares_candidates_on_request(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    training = TrainingConfig(draft_vocab_size=300)
    estimate = plan(
        target=target, dataset=dataset, training=training, home=str(tmp_path), candidates=True
    )
    printed = capsys.readouterr().out
    assert not (tmp_path / "stores").exists()
    assert estimate.missing_tokens > 0
    assert "Candidates: aux layers of tiny on facts" in printed
    assert _line(printed, "aux 1, 3, 4").endswith("<- configured, EAGLE-3 default")
    assert "56 triples of the layers 0, 1, 2, 3, 4, 5, 6, 7" in printed
    (held_out,) = (tmp_path / "tokens").rglob("held_out-*.arrow")
    assert f"of {len(TokenFile(held_out))} held-out conversations" in printed
    assert _line(printed, "vocabulary of 300").endswith("<- configured")
    assert re.search(r"covers 100\.0% of supervised tokens  <- the target's", printed)
    assert printed.index("Plan: tiny") < printed.index("Candidates: aux layers")
    with get_client(sync_client=True) as client:
        for key in ("candidates-layers-tiny-facts", "candidates-vocabulary-tiny-facts"):
            named = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
            assert client.read_artifacts(artifact_filter=named), key


def test_a_part_is_kept_apart_if_nothing_is_held_out(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = dataset.model_copy(update={"held_out_fraction": 0.0, "name": "everything"})
    few = tiny.write_target(tmp_path / "few", num_layers=4)
    shallow = target.model_copy(
        update={"model": str(few), "aux_layers": (0, 1, 3), "name": "shallow"}
    )
    plan(target=shallow, dataset=everything, home=str(tmp_path), candidates=True)
    printed = capsys.readouterr().out
    assert "of 8 conversations set apart" in printed  # every fifth of 40
    assert "4 triples of the layers 0, 1, 2, 3" in printed
    assert _line(printed, "aux 0, 1, 3").endswith("<- configured")
    assert "EAGLE-3 default" not in printed


def test_too_little_data_is_refused_with_what_to_raise(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    little = dataset.model_copy(update={"max_conversations": 10, "name": "little"})
    with pytest.raises(ConfigError, match=r"positions; at least 200.*dataset\.max_conversations"):
        plan(target=target, dataset=little, home=str(tmp_path), candidates=True)


def test_a_shallow_model_has_no_layers_of_eagle3() -> None:
    assert eagle3_layers(8) == (1, 3, 4)
    assert eagle3_layers(6) is None


def _line(printed: str, name: str) -> str:
    lines = [line.strip(" │") for line in printed.splitlines()]
    (found,) = [line for line in lines if line.startswith(name)]
    return found
