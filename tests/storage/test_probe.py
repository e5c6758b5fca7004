"""States that cannot reproduce the target's own words are found, whole bytes or not."""

from dataclasses import replace

import numpy as np
import pytest

from storage.bfloat16 import bf16_to_float
from storage.errors import SampleRefusedError
from storage.maintenance.verify import verify_shard, verify_store
from storage.records.probe_point import ProbePoint
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.synthetic import HIDDEN, VOCAB, planned

HEAD = np.random.default_rng(7).normal(0, 0.1, (VOCAB, HIDDEN)).astype(np.float32)


class LinearHead:
    """A head as a target model has one, whose states are all stored."""

    def log_probabilities(self, last: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        logits = np.tanh(bf16_to_float(last)) @ HEAD.T
        return logits[np.arange(len(token_ids)), token_ids] - np.logaddexp.reduce(logits, axis=1)

    def complete(self, sample: StoredSample) -> StoredSample:
        return sample


recompute = LinearHead()


def point_of(sample: StoredSample, position: int) -> ProbePoint:
    argmax = int(sample.target_argmax[position])
    states = sample.last_hidden_state[position : position + 1]
    logprob = float(recompute.log_probabilities(states, np.array([argmax]))[0])
    return ProbePoint(sample_id=sample.sample_id, position=position, argmax=argmax, logprob=logprob)


def test_wrong_states_do_not_reproduce_the_probe(store: Store, samples: list[StoredSample]) -> None:
    plan = store.plan(planned(samples), shard_tokens=10**6)
    good = point_of(samples[2], len(samples[2]) - 1)
    record = store.write_shard(plan.shards[0], samples, probe=[good])
    assert store.commit(record.shard_id).probe == (good,)
    assert verify_store(store, deep=True, recompute=recompute) == []

    store.revoke(record.shard_id)
    other_norm = replace(samples[2], last_hidden_state=samples[2].last_hidden_state ^ 0x8000)
    wrong = [other_norm if s.sample_id == other_norm.sample_id else s for s in samples]
    store.write_shard(plan.shards[0], wrong, probe=[good])
    assert verify_store(store, deep=True) == []
    (finding,) = verify_store(store, deep=True, recompute=recompute)
    assert finding.shard_id == record.shard_id
    assert f"position {good.position} of sample {good.sample_id}" in finding.problem
    assert verify_shard(store, record.shard_id, recompute=recompute) == [finding]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": 10_000}, "no such token"),
        ({"sample_id": "0" * 32}, "no such token"),
        ({"position": 0}, "no supervised token needs"),
        ({"argmax": VOCAB}, "target_argmax is"),
        ({"logprob": 0.5}, "is not a log-probability"),
        ({"logprob": float("nan")}, "is not a log-probability"),
    ],
)
def test_probe_that_fits_no_sample_is_refused(
    store: Store, samples: list[StoredSample], changes: dict[str, object], message: str
) -> None:
    plan = store.plan(planned(samples), shard_tokens=10**6)
    point = replace(point_of(samples[2], len(samples[2]) - 1), **changes)
    with pytest.raises(SampleRefusedError, match=message):
        store.write_shard(plan.shards[0], samples, probe=[point])
    assert not store.commits()
