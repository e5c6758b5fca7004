"""The rotary embedding of a draft's queries and keys, plain or scaled.

Shapes: E head size.
"""

import json
from functools import lru_cache

import torch
from torch import Tensor

from eagle_core.draft.config import DraftConfig


def rotary(positions: Tensor, config: DraftConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin [..., E] in float32 for positions [...].

    Both have the factor of `frequencies`: where both queries and keys are rotated, scores have its
    square.
    """
    speeds, factor = frequencies(config)
    angles = positions.unsqueeze(-1).float() * speeds.to(positions.device)
    angles = torch.cat([angles, angles], dim=-1)
    if factor == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """Return [E / 2] float32 radians per position, fastest first, and the factor of cos and sin.

    They do not depend on the length of a text (see `rope_scaling`).
    """
    if config.rope_scaling is None:
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        return config.rope_theta ** -exponents.float(), 1.0
    return _scaled(
        json.dumps(config.rope_scaling),
        config.rope_theta,
        config.head_dim,
        config.max_position_embeddings,
    )


@lru_cache(maxsize=16)
def _scaled(
    scaling: str, rope_theta: float, head_dim: int, max_position_embeddings: int
) -> tuple[Tensor, float]:
    from transformers import LlamaConfig  # noqa: PLC0415 (loads torch.distributed)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    parameters = {**json.loads(scaling), "rope_theta": rope_theta}
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=parameters,
    )
    speeds, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    return speeds, float(factor)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [..., E], halves paired as Llama does."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
