"""Quantized targets compute what their weights mean."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from eagle_core.target.model import TargetModel
from eagle_core.target.preflight import check_target
from tests import tiny
from tests.eagle_core.target.test_preflight import (
    BLOCK,
    change_config,
    change_weights,
    target,
    write_fp8,
)
from tests.tiny import SIZES

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
VALUES_PER_BLOCK = 32
SCALES = "_scale_inv"


def test_4_bit_experts_compute_what_their_values_compute(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        tiny.write_target(folder)  # the tokenizer is kept
    experts = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**{**SIZES, **experts}, rope_parameters={"rope_type": "default"})
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(plain)
    config.save_pretrained(packed)
    values, codes = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(EXPERTS):
            values[name] = codes[name] = tensor
            continue
        num_experts, columns, rows = tensor.shape
        shape = (num_experts, rows, columns // VALUES_PER_BLOCK)
        blocks = torch.randint(0, 256, (*shape, VALUES_PER_BLOCK // 2), dtype=torch.uint8)
        scales = torch.randint(118, 124, shape, dtype=torch.uint8)
        codes |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        assert values[name].shape == tensor.shape
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(codes, packed / "model.safetensors", metadata={"format": "pt"})
    change_config(packed, quantization_config={"quant_method": "mxfp4"})
    assert torch.equal(states_of(packed), states_of(plain))


def test_8_bit_layers_compute_what_their_values_compute(tmp_path: Path) -> None:
    for folder in ("packed", "plain"):
        (tmp_path / folder).mkdir()
    packed = write_fp8(tmp_path / "packed", quantized_head=False)
    plain = write_fp8(tmp_path / "plain", quantized_head=False)

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(SCALES)]:
            weight, scales = name.removesuffix(SCALES), tensors.pop(name)
            rows, columns = tensors[weight].shape
            blocks = tensors[weight].float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            tensors[weight] = (blocks * scales[:, None, :, None]).view(rows, columns)

    change_weights(plain, unpack)
    change_config(plain, quantization_config=None)
    assert torch.equal(states_of(packed), states_of(plain))


def states_of(folder: Path) -> torch.Tensor:
    """Return last hidden states of a target that passes the check."""
    one = target(folder, attention="eager")
    check_target(one)
    return TargetModel.load(one).forward_cached(torch.arange(3, 40)[None], None)[0]
