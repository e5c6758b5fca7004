"""Targets, training and decoding on a device that is not there: nothing stays on the CPU."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import generate_plain_batch, generate_speculative_batch
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.safetensors_files import tensor_files
from eagle_core.samples import HiddenStateSample, TokenizedSample, sample_id
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise import layer_loader
from eagle_core.target.layerwise.layer_slices import build_slice, slice_tensors
from eagle_core.target.layerwise.streamed import StreamedTarget
from eagle_core.target.model import TargetModel
from eagle_core.training.config import TttConfig
from eagle_core.training.result import Metrics
from eagle_core.training.ttt import ttt_step
from tests.eagle_core.decoding.float64_target import load_float64_target
from tests.eagle_core.pretend_device import MixedDevicesError, TensorElsewhere, pretend_device
from tests.eagle_core.training.test_trainer import (
    CONFIG,
    CPU,
    InterruptedHereError,
    interrupt_at,
    run,
)
from tests.eagle_core.training.test_ttt import random_case


def test_tensors_of_two_places_do_not_mix() -> None:
    with pretend_device() as device:
        there = torch.ones(2, device=device) + torch.tensor([1.0, 2.0], device=device) * 2
        assert there.device == device
        assert there.tolist() == [3.0, 5.0]
        with pytest.raises(MixedDevicesError, match=r"aten\.add\.Tensor"):
            there + torch.ones(2)
        with pytest.raises(MixedDevicesError, match=r"aten\.index\.Tensor"):
            there[torch.tensor([1])]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"objective": "lk_alpha", "loss_reduction": "sequence"},
        {"objective": "lk_hybrid", "loss_positions": "eagle3"},
        {"gradient_checkpointing": True},
    ],
    ids=["default", "lk_alpha", "lk_hybrid", "checkpointing"],
)
def test_the_step_takes_all_tensors_along(change: dict[str, Any]) -> None:
    options = TttConfig(**change)
    draft, batch, head = random_case(4, [21, 2, 12], fc_norm=True, norm_output=True)
    elsewhere = copy.deepcopy(draft)
    expected = ttt_step(draft, batch, head[draft.t2d], options)
    expected.loss.backward()
    with pretend_device() as device:
        elsewhere.to(device)
        found = ttt_step(elsewhere, batch.to(device), head.to(device)[elsewhere.t2d], options)
        found.loss.backward()
        assert found.loss.item() == expected.loss.item()
        assert found.step_correct.tolist() == expected.step_correct.tolist()
        for name, parameter in elsewhere.named_parameters():
            gradient = draft.get_parameter(name).grad
            if gradient is not None:
                assert isinstance(parameter.grad, TensorElsewhere)
                assert torch.equal(parameter.grad.here, gradient), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_resumes_there_too(tmp_path: Path, optimizer: str) -> None:
    config = CONFIG.model_copy(update={"optimizer": optimizer, "batches_per_step": 2})

    def figures(path: Path, device: torch.device) -> Metrics:
        """Break a run off and finish it."""
        with pytest.raises(InterruptedHereError):
            run(path, config, on_progress=interrupt_at(5), device=device)
        _, result = run(path, config, device=device)
        return result.figures

    expected = figures(tmp_path / "here", CPU)
    with pretend_device() as device:
        assert figures(tmp_path / "elsewhere", device) == expected


def _moved(target: TargetModel, device: torch.device) -> TargetModel:
    model = copy.deepcopy(target._model).to(device)
    return TargetModel(model, config=target.config, model_config=target.model_config)


def _samples() -> list[TokenizedSample]:
    samples = []
    for length in (9, 23, 4):
        ids = np.arange(length, dtype=np.int32) * 7 % 90
        mask = np.arange(length) % 3 == 0
        name = sample_id(ids, mask)
        samples.append(TokenizedSample(sample_id=name, input_ids=ids, loss_mask=mask))
    return samples


def test_a_target_gives_its_states_there(tiny_target_path: Path) -> None:
    target = load_float64_target(tiny_target_path)
    expected = list(capture_states(target, _samples()))
    with pretend_device() as device:
        found = list(capture_states(_moved(target, device), _samples()))
    _require_equal(found, expected)


def test_so_does_one_that_runs_layer_by_layer(
    tiny_target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")
    expected = list(capture_states(TargetModel.load(config), _samples()))
    target = StreamedTarget.load(config, group_tokens=30)
    num_layers = target.model_config.num_hidden_layers
    # transformers builds on the meta device, which the pretended one stands for: outside.
    whole, folder = target.model_config, tiny_target_path
    built = [
        build_slice(config, whole, slice_tensors(tensor_files(folder), folder, layers), layers)
        for layers in (range(number, number + 1) for number in range(num_layers))
    ]
    monkeypatch.setattr(layer_loader, "build_slice", lambda _c, _w, _t, layers: built[layers.start])
    with pretend_device() as device:
        for part in built:
            part.to(device)
        target.device = target._layers._device = device
        target._decoder.to(device)
        target._lm_head = target._lm_head.to(device)
        found = list(capture_states(target, _samples()))
    _require_equal(found, expected)


def _require_equal(
    found: Sequence[HiddenStateSample], expected: Sequence[HiddenStateSample]
) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.sample_id == other.sample_id
        np.testing.assert_array_equal(one.aux_hidden_states, other.aux_hidden_states)
        np.testing.assert_array_equal(one.last_hidden_state, other.last_hidden_state)
        np.testing.assert_array_equal(one.target_argmax, other.target_argmax)
        np.testing.assert_array_equal(one.target_logsumexp, other.target_logsumexp)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_the_cpu(tiny_target_path: Path, temperature: float) -> None:
    target = load_float64_target(tiny_target_path)
    vocab_size = target.model_config.vocab_size
    vocabulary = DraftVocabulary.build(np.arange(vocab_size), size=vocab_size // 2)
    draft = DraftModel(
        DraftConfig.from_target(target.model_config, draft_vocab_size=len(vocabulary))
    ).double()
    head = target.lm_head_weight
    draft.initialise(embedding=head, lm_head=head, vocabulary=vocabulary, seed=1)
    prompts = [[5, 17, 90, 33, 8, 120], [7], [44, 45, 46, 47, 3]]
    config = DecodingConfig(max_new_tokens=20, draft_tokens=3, temperature=temperature)
    expected = [
        [trace.tokens for trace in generate_speculative_batch(target, draft, prompts, config)],
        [trace.tokens for trace in generate_plain_batch(target, prompts, config)],
    ]
    with pretend_device() as device:
        there = _moved(target, device)
        drafted = generate_speculative_batch(there, draft.to(device), prompts, config)
        plain = generate_plain_batch(there, prompts, config)
    assert [[trace.tokens for trace in traces] for traces in (drafted, plain)] == expected
