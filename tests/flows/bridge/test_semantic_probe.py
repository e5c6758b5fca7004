"""What the target said goes into the record; states that do not say it again go nowhere."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eagle_core.bfloat16 import to_bfloat16_bits
from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.samples import HiddenStateSample
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from flows.bridge.recompute import TargetRecompute
from flows.bridge.stored_source import to_stored
from flows.config.store import StoreConfig
from flows.hidden_states import hidden_states
from flows.train import train_flow
from storage.errors import ShardCorruptError
from storage.probe import NUM_POINTS, omitted_channels
from storage.records.identity import OmittedStates
from storage.records.plan import PlannedShard
from storage.records.probe_point import ProbePoint
from storage.samples import StoredSample
from storage.store import Store
from tests.flows.outspoken import write_biased_target, write_outspoken_target
from tests.storage.synthetic import make_identity, make_samples, planned, shard_sizes

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

Change = Callable[[HiddenStateSample, TargetModel], HiddenStateSample]


@pytest.fixture(scope="module")
def outspoken_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny target that is sure of what it says."""
    return write_outspoken_target(tmp_path_factory.mktemp("outspoken"))


@pytest.fixture
def outspoken(outspoken_path: Path, target: TargetConfig) -> TargetConfig:
    """The target of these tests."""
    return target.model_copy(update={"model": str(outspoken_path)})


@pytest.fixture
def made(tmp_path: Path, outspoken: TargetConfig, dataset: DatasetConfig) -> Store:
    """A store made by the flow; states are bit-exact in it."""
    store = StoreConfig(shard_tokens=600, shards_per_task=4)
    summary = hidden_states(target=outspoken, dataset=dataset, store=store, home=str(tmp_path))
    return Store.open(summary.store_root)


def _token_files(home: Path) -> list[TokenFile]:
    return [TokenFile(path) for path in sorted((home / "tokens").rglob("*.arrow"))]


def test_every_record_holds_what_the_target_said_at_supervised_tokens(
    made: Store, tmp_path: Path, outspoken: TargetConfig
) -> None:
    files = _token_files(tmp_path)
    masks = {sample.sample_id: sample.loss_mask for file in files for sample in file}
    target = TargetModel.load(outspoken)
    for record in made.commits().values():
        assert len(set(record.probe)) == NUM_POINTS
        assert all(masks[point.sample_id][point.position] for point in record.probe)
        assert len({point.sample_id for point in record.probe}) > 1
        point = record.probe[0]
        (sample,) = (s for f in files if point.sample_id in f for s in f.by_id([point.sample_id]))
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        with torch.inference_mode():
            last, _, _ = target.forward_cached(ids, None)
            said = target.logits(last)[0, point.position].log_softmax(dim=-1)
        assert int(said.argmax()) == point.argmax
        assert abs(float(said[point.argmax]) - point.logprob) < 1e-3


def _before_the_norm(state: HiddenStateSample, target: TargetModel) -> HiddenStateSample:
    seen: list[torch.Tensor] = []
    hook = target._decoder.norm.register_forward_pre_hook(  # type: ignore[operator, union-attr]
        lambda _module, inputs: seen.append(inputs[0])
    )
    target.forward_cached(torch.from_numpy(state.input_ids.astype(np.int64))[None], None)
    hook.remove()
    return replace(state, last_hidden_state=to_bfloat16_bits(seen[0][0]))


def _of_another_layer(state: HiddenStateSample, _target: TargetModel) -> HiddenStateSample:
    return replace(state, last_hidden_state=state.aux_hidden_states[:, -1])


def _of_the_next_token(state: HiddenStateSample, _target: TargetModel) -> HiddenStateSample:
    return replace(state, last_hidden_state=np.roll(state.last_hidden_state, -1, axis=0))


def _store_again(
    store: Store,
    shard_id: str,
    home: Path,
    target: TargetModel,
    to: Change,
    *,
    recompute: TargetRecompute | None = None,
) -> None:
    """Commit other states under the probe that the right ones were committed with."""
    record = store.commit(shard_id)
    shard = PlannedShard(
        shard_id=shard_id, sample_ids=record.sample_ids, num_tokens=record.num_tokens
    )
    wanted = [
        sample
        for file in _token_files(home)
        for sample in file.by_id([name for name in record.sample_ids if name in file])
    ]
    states = [to(state, target) for state in capture_states(target, wanted)]
    store.revoke(shard_id)
    stored = [to_stored(state) for state in states]
    store.write_shard(shard, stored, probe=record.probe, recompute=recompute)


@pytest.mark.parametrize("change", [_before_the_norm, _of_another_layer, _of_the_next_token])
def test_wrong_states_are_never_committed(
    made: Store, tmp_path: Path, outspoken: TargetConfig, change: Change
) -> None:
    target = TargetModel.load(outspoken)
    recompute = TargetRecompute(target.lm_head_weight, None)
    shard_id = made.shard_ids()[1]
    right: Change = lambda state, _target: state  # noqa: E731
    _store_again(made, shard_id, tmp_path, target, right, recompute=recompute)
    with pytest.raises(ShardCorruptError, match=f"{shard_id}.*log-probability.*not committed"):
        _store_again(made, shard_id, tmp_path, target, change, recompute=recompute)
    assert shard_id not in made.shard_ids()


def test_training_refuses_a_store_that_does_not_say_what_the_target_said(
    made: Store, tmp_path: Path, outspoken: TargetConfig, dataset: DatasetConfig
) -> None:
    shard_id = made.snapshot().shard_ids[-1]
    _store_again(made, shard_id, tmp_path, TargetModel.load(outspoken), _before_the_norm)
    with pytest.raises(ShardCorruptError, match=f"shard {shard_id} must not.*eyas repair"):
        train_flow(
            target=outspoken,
            dataset=dataset,
            training=TrainingConfig(dtype="float32", draft_vocab_size=300, max_steps=1),
            home=str(tmp_path),
        )
    assert not list((tmp_path / "runs").rglob("*checkpoint*"))


def test_a_head_with_a_bias_is_refused_before_anything_is_tokenised(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    folder = write_biased_target(tmp_path / "biased")
    biased = target.model_copy(update={"model": str(folder)})
    with pytest.raises(ConfigError, match="a head with a bias"):
        hidden_states(target=biased, dataset=dataset, store=store, home=str(tmp_path))
    assert not list(tmp_path.rglob("*.arrow"))


class _RemadeAs:
    """A target that makes left out states again as these samples have them."""

    def __init__(self, samples: Sequence[StoredSample]) -> None:
        self._samples = {sample.sample_id: sample for sample in samples}

    def log_probabilities(self, _last: Any, ids: Any) -> Any:
        return np.full(len(ids), -1.0, np.float32)

    def complete(self, sample: StoredSample) -> StoredSample:
        remade = self._samples[sample.sample_id]
        return replace(
            sample,
            aux_hidden_states=remade.aux_hidden_states,
            last_hidden_state=remade.last_hidden_state,
        )


def test_a_rivals_shard_from_other_hardware_stays(tmp_path: Path) -> None:
    """Its last bits differ from those made again here, and it is as good as one made here."""
    omitted = OmittedStates(mode="one_sequence", early_layers=(0, 1), last_layers=(9,))
    store = Store.create(str(tmp_path), make_identity(omitted=omitted))
    theirs = make_samples(3)
    ours = [_with_other_last_bits(sample) for sample in theirs]
    shard = PlannedShard.of(planned(theirs))
    store.write_shard(shard, theirs, probe=_probe(theirs))

    store.write_shard(shard, ours, probe=_probe(ours), recompute=_RemadeAs(ours))
    assert store.shard_ids() == [shard.shard_id]

    store.revoke(shard.shard_id)
    with pytest.raises(ShardCorruptError):  # made here, and this machine makes other bits now
        store.write_shard(shard, ours, probe=_probe(ours), recompute=_RemadeAs(theirs))


class _Breaks(_RemadeAs):
    """A target of which some layer cannot be run alone."""

    def complete(self, _sample: StoredSample) -> StoredSample:
        raise RuntimeError("mat1 and mat2 must have the same dtype")


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_check_that_breaks_commits_nothing_however_often(tmp_path: Path, place: str) -> None:
    """It used to be committed first: the next attempt found it, and published it unverified."""
    omitted = OmittedStates(mode="one_sequence", early_layers=(0, 1), last_layers=(9,))
    root = str(tmp_path) if place == "local" else f"memory:/{tmp_path}"
    store = Store.create(root, make_identity(omitted=omitted))
    samples = make_samples(3)
    shard = PlannedShard.of(planned(samples))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="same dtype"):
            store.write_shard(shard, samples, probe=_probe(samples), recompute=_Breaks(samples))
        assert store.shard_ids() == []
    if place == "local":
        assert shard_sizes(store) == {}, "what cannot be used takes no space"


def _with_other_last_bits(sample: StoredSample) -> StoredSample:
    aux = sample.aux_hidden_states.copy()
    aux[:, 0] ^= 1
    return replace(sample, aux_hidden_states=aux)


def _probe(samples: Sequence[StoredSample]) -> list[ProbePoint]:
    return [
        ProbePoint(
            sample_id=sample.sample_id,
            position=len(sample) - 1,
            argmax=int(sample.target_argmax[-1]),
            logprob=-1.0,
            omitted=omitted_channels(
                sample.aux_hidden_states, sample.last_hidden_state, len(sample) - 1
            ),
        )
        for sample in samples
    ]
