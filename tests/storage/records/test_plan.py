"""Planning is pure: deterministic, whole samples, only what is missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConfigError, CorruptError
from storage.records.plan import Plan, PlannedSample, plan_shards

LENGTHS = st.lists(st.integers(1, 200), max_size=40)


def named(lengths: list[int]) -> list[PlannedSample]:
    return [PlannedSample(sample_id=f"{i:032x}", num_tokens=n) for i, n in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 300), st.data())
def test_holds_exactly_the_missing_samples_once(
    lengths: list[int], shard_tokens: int, data: st.DataObject
) -> None:
    samples = named(lengths)
    committed = {s.sample_id for s in samples if data.draw(st.booleans())}
    plan = plan_shards(samples, committed=committed, shard_tokens=shard_tokens)
    planned = [sample_id for shard in plan.shards for sample_id in shard.sample_ids]
    assert planned == [s.sample_id for s in samples if s.sample_id not in committed]
    for shard in plan.shards:
        assert shard.num_tokens <= shard_tokens or len(shard.sample_ids) == 1


@given(LENGTHS.filter(bool), st.integers(1, 300), st.data())
def test_goes_on_with_the_pending_shards(
    lengths: list[int], shard_tokens: int, data: st.DataObject
) -> None:
    """Whatever was committed before the kill, the rest of the plan comes out unchanged."""
    samples = named(lengths)
    plan = plan_shards(samples, committed=(), shard_tokens=shard_tokens)
    done = [shard for shard in plan.shards if data.draw(st.booleans())]
    rest = [shard for shard in plan.shards if shard not in done]
    resumed = plan_shards(
        samples,
        committed={i for shard in done for i in shard.sample_ids},
        shard_tokens=shard_tokens,
        pending=rest,
    )
    assert list(resumed.shards) == rest


def test_one_percent_more_plans_one_percent() -> None:
    old, new = named([10] * 1000), named([10] * 1010)
    plan = plan_shards(new, committed={s.sample_id for s in old}, shard_tokens=50)
    assert sum(shard.num_tokens for shard in plan.shards) == 100
    assert not plan_shards(old[:500], committed={s.sample_id for s in old}, shard_tokens=50).shards


def test_pending_shard_with_an_unwanted_sample_is_dissolved() -> None:
    samples = named([10, 10, 10])
    pending = plan_shards(samples, committed=(), shard_tokens=30).shards
    plan = plan_shards(samples[:2], committed=(), shard_tokens=30, pending=pending)
    assert [shard.sample_ids for shard in plan.shards] == [tuple(s.sample_id for s in samples[:2])]


def test_duplicates_count_once() -> None:
    samples = named([10, 10])
    assert plan_shards([*samples, *samples], committed=(), shard_tokens=15) == plan_shards(
        samples, committed=(), shard_tokens=15
    )


def test_json_round_trip_and_foreign_plan() -> None:
    plan = plan_shards(named([3, 4, 5]), committed=(), shard_tokens=7)
    other = plan_shards(named([3, 4]), committed=(), shard_tokens=7)
    assert Plan.from_json(plan.to_json(), plan_id=plan.plan_id) == plan
    with pytest.raises(CorruptError, match=plan.plan_id):
        Plan.from_json(plan.to_json(), plan_id=other.plan_id)


def test_refuses_a_shard_of_no_tokens() -> None:
    with pytest.raises(ConfigError, match="shard_tokens is 0"):
        plan_shards([], committed=(), shard_tokens=0)
