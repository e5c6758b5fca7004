"""The estimate is right, costs nothing to ask for, and is asked for before the first shard."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.config.store import StoreConfig
from flows.errors import DoesNotFitError
from flows.hidden_states import hidden_states
from flows.plan import plan
from flows.reports.cost import encoding_name
from storage.profiles import PROFILES
from storage.store import Store

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


def test_the_estimate_is_what_generation_then_takes(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    store = StoreConfig(shard_tokens=2000)
    estimate = plan(target=target, dataset=dataset, store=store, home=str(tmp_path))
    printed = capsys.readouterr().out
    assert not (tmp_path / "stores").exists()
    half = {encoding_name(profile, recompute=True) for profile in PROFILES}
    assert set(estimate.bytes_per_token) == {*PROFILES, *half}
    for profile in PROFILES:
        with_recompute = estimate.bytes_per_token[encoding_name(profile, recompute=True)]
        assert with_recompute < 0.75 * estimate.bytes_per_token[profile]
    assert estimate.recompute is not None
    assert estimate.recompute.share_of_capture > 0
    assert "recompute during training" in printed
    assert f"{estimate.recompute.tokens_per_second:,.0f} tokens per second" in printed
    assert f"{estimate.missing_tokens:,} tokens, {estimate.num_shards} shards" in printed
    assert "memory for training" in printed
    assert estimate.tokens_per_second > 0
    assert estimate.free_bytes is not None

    made = hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    assert (made.num_shards, made.num_tokens) == (estimate.num_shards, estimate.num_tokens)
    assert estimate.bytes_per_token["lossless"] == pytest.approx(
        made.stored_bytes_per_token, rel=0.1
    )

    after = plan(target=target, dataset=dataset, store=store, home=str(tmp_path))
    assert after.num_shards == after.missing_tokens == 0
    assert after.stored_bytes == made.stored_bytes
    assert "nothing: every sample has its states" in capsys.readouterr().out


def test_no_shard_is_made_when_not_all_would_fit(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    store = StoreConfig(shard_tokens=600, budget="200 KB")
    with pytest.raises(DoesNotFitError, match=r"budget is 200\.0 KB.*short by"):
        hidden_states(target=target, dataset=dataset, store=store, home=str(tmp_path))
    assert not (tmp_path / "stores").exists()  # not even a profile is settled
    with pytest.raises(DoesNotFitError, match="short by"):
        plan(target=target, dataset=dataset, store=store, home=str(tmp_path))


def test_a_budget_counts_what_is_there_already(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    store = StoreConfig(shard_tokens=600, shards_per_task=100)
    fewer = dataset.model_copy(update={"max_conversations": 8})
    made = hidden_states(target=target, dataset=fewer, store=store, home=str(tmp_path))
    before = Store.open(made.store_root).shard_ids()

    tight = store.model_copy(update={"budget": made.stored_bytes + 1000})
    with pytest.raises(DoesNotFitError, match="are already stored"):
        hidden_states(target=target, dataset=dataset, store=tight, home=str(tmp_path))
    assert Store.open(made.store_root).shard_ids() == before

    ample = StoreConfig.model_validate({**store.model_dump(), "budget": "1.5 GB"})
    more = hidden_states(target=target, dataset=dataset, store=ample, home=str(tmp_path))
    assert more.shards_made > 0


def test_a_budget_is_written_as_people_write_sizes() -> None:
    assert StoreConfig(budget="2TB").budget == 2 * 10**12
    assert StoreConfig(budget="1GiB").budget == 2**30
    with pytest.raises(ValidationError, match="byte unit"):
        StoreConfig(budget="2 lots")
