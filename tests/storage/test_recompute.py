"""Stores that leave states out: what shards hold, what readers get, and what the probe notices."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.bfloat16 import bf16_to_float
from storage.errors import ConfigError, MismatchError, SampleRefusedError
from storage.maintenance.verify import verify_shard, verify_store
from storage.objects.sealed_json import unseal
from storage.probe import omitted_channels
from storage.records.identity import OmittedStates, StoreIdentity
from storage.records.probe_point import NUM_CHANNELS, ProbePoint
from storage.samples import StoredSample, last_needed
from storage.store import Store
from tests.storage.synthetic import HIDDEN, VOCAB, fill, make_identity, planned, zarr_objects

OMITTED = OmittedStates(mode="one_sequence", early_layers=(0, 1), last_layers=(9, 10, 11))
HEAD = np.random.default_rng(7).normal(0, 0.1, (VOCAB, HIDDEN)).astype(np.float32)


class Maker:
    """Makes states again by having kept them, moved by some of their last bits."""

    def __init__(
        self, samples: list[StoredSample], *, early_ulps: int = 0, last_ulps: int = 0
    ) -> None:
        self._samples = {sample.sample_id: sample for sample in samples}
        self._early_ulps, self._last_ulps = early_ulps, last_ulps

    def log_probabilities(self, last: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        logits = np.tanh(bf16_to_float(last)) @ HEAD.T
        return logits[np.arange(len(token_ids)), token_ids] - np.logaddexp.reduce(logits, axis=1)

    def complete(self, sample: StoredSample) -> StoredSample:
        whole = self._samples[sample.sample_id]
        early = whole.aux_hidden_states[:, :1] + np.uint16(self._early_ulps)
        aux = np.concatenate([early, sample.aux_hidden_states], axis=1)
        last = whole.last_hidden_state + np.uint16(self._last_ulps)
        return replace(sample, aux_hidden_states=aux, last_hidden_state=last)


def point_of(sample: StoredSample, maker: Maker) -> ProbePoint:
    position = len(sample) - 1
    argmax = sample.target_argmax[position : position + 1]
    last = sample.last_hidden_state
    return ProbePoint(
        sample_id=sample.sample_id,
        position=position,
        argmax=int(argmax[0]),
        logprob=float(maker.log_probabilities(last[position : position + 1], argmax)[0]),
        omitted=omitted_channels(sample.aux_hidden_states, last, position),
    )


@pytest.fixture(params=["raw", "lossless", "int8"])
def profile(request: pytest.FixtureRequest) -> str:
    return request.param


def test_shards_lack_the_states_and_readers_get_the_others(
    tmp_path: Path, samples: list[StoredSample], profile: str
) -> None:
    sizes: Mapping[bool, list[int]] = {False: [], True: []}
    found = {}
    for omitted in (False, True):
        identity = make_identity(profile=profile, omitted=OMITTED if omitted else None)
        store = Store.create(str(tmp_path / str(omitted)), identity)
        fill(store, samples, shard_tokens=10**6)
        (record,) = store.commits().values()
        assert (
            any(key.startswith("last_hidden_state") for key in zarr_objects(store, record.shard_id))
            is not omitted
        )
        sizes[omitted].append(record.stored_bytes)
        reader = store.reader(store.publish([sample.sample_id for sample in samples]))
        found[omitted] = {s.sample_id: s for s in map(reader.fetch, range(len(reader)))}
    assert sizes[True][0] < 0.7 * sizes[False][0]
    for sample_id, kept in found[True].items():
        whole = found[False][sample_id]
        assert kept.last_hidden_state.shape == (0, HIDDEN)
        np.testing.assert_array_equal(kept.aux_hidden_states, whole.aux_hidden_states[:, 1:])
        np.testing.assert_array_equal(kept.last_present, last_needed(kept.loss_mask))
        np.testing.assert_array_equal(kept.target_logsumexp, whole.target_logsumexp)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store that leaves states out."""
    return Store.create(str(tmp_path / "s"), make_identity(omitted=OMITTED))


def test_the_probe_covers_states_that_are_made_again(
    store: Store, samples: list[StoredSample]
) -> None:
    maker = Maker(samples)
    plan = store.plan(planned(samples), shard_tokens=10**6)
    point = point_of(samples[2], maker)
    shard_id = store.write_shard(plan.shards[0], samples, probe=[point]).shard_id
    assert store.commit(shard_id).probe == (point,)
    assert verify_shard(store, shard_id, recompute=maker, exact=True) == []
    assert verify_store(store, deep=True, recompute=maker) == []

    (rounded,) = verify_shard(store, shard_id, recompute=Maker(samples, early_ulps=1), exact=True)
    assert "differ in bits" in rounded.problem
    assert verify_store(store, deep=True, recompute=Maker(samples, early_ulps=1)) == []
    (another,) = verify_store(store, deep=True, recompute=Maker(samples, early_ulps=1 << 7))
    assert f"{point}: the recomputed early aux state differs" in another.problem
    elsewhere = [replace(s, last_hidden_state=s.last_hidden_state ^ 0x8000) for s in samples]
    (wrong,) = verify_store(store, deep=True, recompute=Maker(elsewhere))
    assert "log-probability" in wrong.problem


def test_last_states_must_be_exact_only_where_they_follow_from_exact_states(
    tmp_path: Path, samples: list[StoredSample], profile: str
) -> None:
    """The codes of a quantized profile move the late state, and so the last one."""
    identity = make_identity(profile=profile, omitted=OMITTED)
    store = Store.create(str(tmp_path / "s"), identity)
    plan = store.plan(planned(samples), shard_tokens=10**6)
    point = point_of(samples[2], Maker(samples))
    shard_id = store.write_shard(plan.shards[0], samples, probe=[point]).shard_id
    rounded = verify_shard(store, shard_id, recompute=Maker(samples, last_ulps=1), exact=True)
    assert len(rounded) == (0 if profile == "int8" else 1)


def test_a_point_with_other_channels_than_the_sample_is_refused(
    store: Store, samples: list[StoredSample]
) -> None:
    plan = store.plan(planned(samples), shard_tokens=10**6)
    point = point_of(samples[2], Maker(samples))
    assert len(point.omitted) == 2 * NUM_CHANNELS
    for wrong in ((), (*point.omitted[:-1], point.omitted[-1] ^ 1)):
        with pytest.raises(SampleRefusedError, match="channels of the omitted states"):
            store.write_shard(plan.shards[0], samples, probe=[replace(point, omitted=wrong)])


def test_stores_that_leave_other_states_out_are_never_mixed(tmp_path: Path) -> None:
    whole, partly = make_identity(), make_identity(omitted=OMITTED)
    assert "left_out" not in unseal(whole.to_json(), what="store.json")["identity"]  # type: ignore[operator]
    assert StoreIdentity.from_json(partly.to_json()) == partly
    assert whole.identity_id != partly.identity_id
    Store.create(str(tmp_path / "s"), whole)
    with pytest.raises(
        MismatchError,
        match=r"store\.recompute: found every state is stored, expected layers \[0, 1\] and \[9, ",
    ):
        Store.create(str(tmp_path / "s"), partly)


@pytest.mark.parametrize(
    ("omitted", "message"),
    [
        (replace(OMITTED, mode="padded"), "unknown recompute mode 'padded'"),
        (replace(OMITTED, early_layers=(0,)), "expected 0 to 1, and those from 9 on"),
        (replace(OMITTED, last_layers=(8, 9)), "expected 0 to 1, and those from 9 on"),
    ],
)
def test_layers_that_do_not_make_the_states_are_refused(
    omitted: OmittedStates, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_identity(omitted=omitted)
