"""The end of a target: its final norm and its head, loaded without the layers before them.

Shapes: T tokens, H hidden size, V vocabulary.
"""

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import tensor_files
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.layerwise.layer_slices import build_slice, slice_tensors
from eagle_core.target.model_config import read_model_config, resolve_device, target_dtype

_NORMS = ("norm", "final_layernorm")
"""Names of the final norm in a decoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalHead:
    """What turns the output of the last decoder layer into logits."""

    norm: nn.Module
    lm_head: Tensor
    """[V, H]"""

    @classmethod
    def load(cls, config: TargetConfig, *, cure: str) -> Self:
        """Load norm and head onto the target's device.

        Args:
            config: the target.
            cure: what to do where there is no final norm of a known name, the end of the message.

        Raises:
            ConfigError: no weights, or an architecture without one final norm.

        """
        folder = weights.locate(config)
        plain = copy.deepcopy(read_model_config(config, folder))
        vars(plain).pop("quantization_config", None)  # a norm is never quantized
        device, none = resolve_device(config.device), range(0)
        tensors = slice_tensors(tensor_files(folder), folder, none, with_embedding=False)
        any_attention = config.model_copy(update={"attention": "eager"})  # each class has it
        built = build_slice(any_attention, plain, tensors, none)
        norm = next((one for name in _NORMS if (one := getattr(built, name, None))), None)
        if norm is None:
            raise ConfigError(
                f"target {config.name}: {type(built).__name__} has no final norm of a known name "
                f"({', '.join(_NORMS)}); {cure}"
            )
        _, lm_head = load_ends(folder, dtype=target_dtype(config))
        return cls(norm=norm.to(device), lm_head=lm_head.to(device))

    @torch.inference_mode()
    def normed(self, states: Tensor) -> Tensor:
        """Return the post-norm states [..., H] of outputs [..., H] of the last layer."""
        normed: Tensor = self.norm(states.to(self.lm_head))
        return normed

    def logits(self, last: Tensor) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""
        return nn.functional.linear(last.to(self.lm_head), self.lm_head)
