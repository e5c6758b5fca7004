"""The target as a source: the store's own samples and bits, each group computed once an epoch."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from eagle_core.training.loader import LoaderState, StepShape, count_steps, steps
from eagle_core.training.pieces import Windows
from flows.bridge.online_source import OnlineSource
from tests.eagle_core.target.test_model import tokenized

WINDOW = 3


def test_an_epoch_computes_every_sample_once(
    tmp_path: Path, target: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_computed = 0

    def counted(
        model: TargetModel, samples: Sequence[TokenizedSample]
    ) -> Iterator[HiddenStateSample]:
        nonlocal num_computed
        num_computed += len(samples)
        return capture_states(model, samples)

    monkeypatch.setattr("flows.bridge.online_source.capture_states", counted)
    tokens: TokenFile = write_token_file(tmp_path / "train.arrow", tokenized([20] * 40))
    model = TargetModel.load(target)
    source = OnlineSource(
        lambda: model,
        tokens,
        group_tokens=80,
        groups_kept=WINDOW,
        target_fingerprint="f",
    )
    assert len(np.unique(source.groups)) == 10
    start = LoaderState(source_id=source.source_id, seed=1)
    stream = steps(source, start, StepShape(window=WINDOW, batch_tokens=60))
    seen = [
        sample_id
        for loaded in takewhile(lambda loaded: loaded.after.epoch == 0, stream)
        for batch in loaded.batches
        for sample_id in batch.sample_ids
    ]
    stream.close()  # type: ignore[attr-defined]
    assert len(seen) == len(set(seen)) >= 36
    # The loader reads a few batches ahead into the next epoch: at most another window.
    assert num_computed <= 40 + WINDOW * 4


def test_pieces_of_a_sample_compute_its_states_once(
    tmp_path: Path, target: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with one group in memory, and though other samples' groups are computed meanwhile."""
    computed: list[str] = []

    def counted(
        model: TargetModel, samples: Sequence[TokenizedSample]
    ) -> Iterator[HiddenStateSample]:
        computed.extend(sample.sample_id for sample in samples)
        return capture_states(model, samples)

    monkeypatch.setattr("flows.bridge.online_source.capture_states", counted)
    tokens = write_token_file(tmp_path / "train.arrow", tokenized([20, 90, 20, 90, 20, 90]))
    model = TargetModel.load(target)
    source = OnlineSource(
        lambda: model, tokens, group_tokens=80, groups_kept=1, target_fingerprint="f"
    )
    windows = Windows(tokens=30, before=8, after=4)
    shape = StepShape(window=1, batch_tokens=30, windows=windows)
    num_steps = count_steps(source.lengths, source.groups, shape, seed=1, epochs=1)
    assert num_steps > 15
    stream = steps(source, LoaderState(source_id=source.source_id, seed=1), shape)
    whole = {sample.sample_id: sample for sample in map(source.fetch, range(6))}
    computed.clear()
    of_epoch = [batch for _ in range(num_steps) for batch in next(stream).batches]
    stream.close()  # type: ignore[attr-defined]
    assert sum(batch.num_own_tokens for batch in of_epoch) == source.lengths.sum()
    assert max(batch.num_tokens for batch in of_epoch) <= 30
    assert len(computed[: len(whole)]) == len(set(computed[: len(whole)])) == 6
    for batch in of_epoch:
        if len(batch.sample_ids) == 1 and batch.own is not None:
            ids = whole[batch.sample_ids[0]].input_ids.tolist()
            text = batch.input_ids.tolist()
            assert any(ids[first : first + len(text)] == text for first in range(len(ids)))


def test_a_released_target_is_gone_and_loaded_again_when_it_is_needed(
    tmp_path: Path, target: TargetConfig
) -> None:
    loaded: list[weakref.ref[TargetModel]] = []

    def load() -> TargetModel:
        one = TargetModel.load(target)
        loaded.append(weakref.ref(one))
        return one

    source = OnlineSource(
        load,
        write_token_file(tmp_path / "train.arrow", tokenized([20] * 4)),
        group_tokens=80,
        groups_kept=WINDOW,
        target_fingerprint="f",
    )
    before = source.fetch(0)
    source.release_target()
    gc.collect()
    assert [one() for one in loaded] == [None]
    assert np.array_equal(source.fetch(0).last_hidden_state, before.last_hidden_state)
    assert len(loaded) == 2
