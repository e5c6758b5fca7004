"""The rotary embedding of a draft is that of transformers, at every position."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.rotary import frequencies, rotary

PYTHON = os.environ.get("EYAS_VLLM_PYTHON")
HEAD_DIM = 64
POSITIONS = 65536
ORIGINAL = {"original_max_position_embeddings": 8192}
FACTORS = [1.0 + number / 7 for number in range(HEAD_DIM // 2)]
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 8.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_fast": 20, **ORIGINAL},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.2, **ORIGINAL},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.9, "beta_slow": 2, **ORIGINAL},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **ORIGINAL,
    },
    {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, **ORIGINAL},
]
SIZES = {
    "hidden_size": 128,
    "target_hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "vocab_size": 100,
    "draft_vocab_size": 50,
    "max_position_embeddings": POSITIONS,
}


def _names(scaling: dict[str, Any] | None) -> str:
    return "plain" if scaling is None else "-".join([scaling["rope_type"], *list(scaling)[2:3]])


@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=_names)
def test_angles_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    config = DraftConfig.model_validate({**SIZES, "rope_theta": 500000.0, "rope_scaling": scaling})
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": 500000.0}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=128,
            num_attention_heads=2,
            head_dim=HEAD_DIM,
            max_position_embeddings=POSITIONS,
            rope_parameters=parameters,
        )
    )
    positions = torch.arange(POSITIONS)
    expected = theirs(torch.zeros(1), positions.unsqueeze(0))
    for found, wanted in zip(rotary(positions, config), expected, strict=True):
        # One unit in the last place of a frequency is 65536 * 6e-8 radians at the last position.
        torch.testing.assert_close(found, wanted[0], rtol=0, atol=1e-2 if scaling is None else 1e-5)
    assert frequencies(config)[1] == pytest.approx(theirs.attention_scaling)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs vLLM; see CONTRIBUTING.md: make test-engine")
def test_angles_are_those_of_vllm_to_the_bit(tmp_path: Path) -> None:
    configs = [
        DraftConfig.model_validate({**SIZES, "rope_theta": 500000.0, "rope_scaling": scaling})
        for scaling in SCALINGS
    ]
    cases = [{**(config.rope_scaling or {}), "rope_theta": 500000.0} for config in configs]
    request, answer = tmp_path / "request.json", tmp_path / "answer.safetensors"
    request.write_text(
        json.dumps({"head_dim": HEAD_DIM, "positions": POSITIONS, "cases": cases}), "utf-8"
    )
    probe = Path(__file__).with_name("vllm_rope_probe.py")
    subprocess.run([str(PYTHON), str(probe), str(request), str(answer)], check=True, cwd=tmp_path)
    tables = load_file(answer)
    assert len(tables) == len(SCALINGS)
    for number, config in enumerate(configs):
        halves = (angle[:, : HEAD_DIM // 2] for angle in rotary(torch.arange(POSITIONS), config))
        assert torch.equal(torch.cat([*halves], dim=1), tables[str(number)]), config.rope_scaling


def test_the_checked_scalings_differ_from_the_plain_embedding() -> None:
    plain, _ = rotary(torch.arange(9000), DraftConfig.model_validate(SIZES))
    for scaling in SCALINGS:
        config = DraftConfig.model_validate({**SIZES, "rope_scaling": scaling})
        found, _ = rotary(torch.arange(9000), config)
        assert torch.allclose(found, plain, atol=1e-2) == (scaling["rope_type"] == "dynamic"), (
            scaling
        )


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"rope_type": "ntk", "factor": 2.0}, "type ntk with factor is not supported"),
        ({"rope_type": "default", "mrope_section": [8, 12, 12]}, "default with mrope_section"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "dynamic has alpha"),
        ({"rope_type": "yarn", "factor": 2.0}, "lacks original_max_position_embeddings"),
        ({"rope_type": "yarn", "factor": "2", **ORIGINAL}, r"factor is '2'; expected a number"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, "another rope_theta"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "whole heads"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 32,
                "long_factor": FACTORS,
                **ORIGINAL,
            },
            "chooses by the longest context it serves",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], **ORIGINAL},
            "has 1 numbers; expected 32",
        ),
        ({**SCALINGS[-1], "factor": 3.0}, "which is 8.0; leave factor out"),
        ({**SCALINGS[-1], "attention_factor": 1.0}, "longrope has attention_factor"),
    ],
)
def test_what_engines_would_not_agree_on_is_refused_by_name(
    scaling: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        DraftConfig.model_validate({**SIZES, "rope_scaling": scaling})


def test_scalings_are_held_in_one_form() -> None:
    def held(scaling: dict[str, Any]) -> dict[str, Any] | None:
        return DraftConfig.model_validate({**SIZES, "rope_scaling": scaling}).rope_scaling

    assert held({"rope_type": "default", "rope_theta": 10000.0}) is None
    assert held({"type": "linear", "factor": 2, "attention_factor": None}) == {
        "rope_type": "linear",
        "factor": 2.0,
    }
    once = held(SCALINGS[-1])
    assert once is not None
    assert held(once) == once
