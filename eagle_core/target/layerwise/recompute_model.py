"""Recompute a target's early and last states with its first and last decoder layers.

The early aux state is the output of the first layers for the token ids. `last` is the output of the
final layers and the norm for the late aux state. Both parts are built by the target's own
transformers classes from a slice of its configuration. No other weights are read.

Run one sequence at a time, on the machine and with the kernels of the capture, they reproduce the
bits of `capture_states(..., for_recompute=True)`. Sequences run together are padded, so matrix
products round differently. Targets whose layers are not a chain are refused (`layer_slices`).

Shapes: T tokens, H hidden size, V vocabulary.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eagle_core.bfloat16 import from_bfloat16_bits, to_bfloat16_bits
from eagle_core.safetensors_files import tensor_files
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.layer_slices import (
    build_slice,
    plain_layers,
    require_chain,
    require_own_layers,
    slice_tensors,
)
from eagle_core.target.length_rope import LengthRope
from eagle_core.target.model_config import aux_layers, read_model_config, resolve_device

if TYPE_CHECKING:  # takes 2 of the 8 seconds before a flow starts; only running a model needs it
    from transformers import PreTrainedModel

CURE = "set store.recompute to false"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredStates:
    """The stored states of one sequence, from which the others are recomputed."""

    input_ids: NDArray[np.int32]
    """[T]"""
    late: NDArray[np.uint16]
    """[T, H] bfloat16 bits of the last aux layer's output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputedStates:
    """The states of one sequence that a store can omit."""

    early: NDArray[np.uint16]
    """[T, H] bfloat16 bits of the first aux layer's output."""
    last: NDArray[np.uint16]
    """[T, H] bfloat16 bits after the final norm."""


def recomputed_layers(layers: tuple[int, ...], num_layers: int) -> tuple[range, range]:
    """Return the decoder layers that compute the early aux state, and those that compute `last`."""
    return range(layers[0] + 1), range(layers[-1] + 1, num_layers)


class RecomputeModel:
    """The first and the last layers of a target, on one device, never trained.

    Safe to call from several threads: calls run one after another.
    """

    def __init__(
        self,
        *,
        first: "PreTrainedModel",
        final: "PreTrainedModel",
        early_layers: range,
        last_layers: range,
        load_seconds: float = 0.0,
    ) -> None:
        """Use `RecomputeModel.load` instead."""
        self.early_layers = early_layers
        self.last_layers = last_layers
        self.load_seconds = load_seconds
        self._first, self._final = first, final
        self._lock = threading.Lock()  # hooks belong to the module, not to the caller

    @classmethod
    def load(cls, config: TargetConfig, *, cure: str = CURE) -> "RecomputeModel":
        """Load the first and last layers, the embedding and the norm onto the target's device.

        `cure` is what to do about layers that cannot be run alone, the end of the message.

        Raises:
            ConfigError: the weights are missing, or this architecture's layers are not a chain.

        """
        started = time.monotonic()
        folder = weights.locate(config)
        whole = read_model_config(config, folder)
        num_layers = whole.num_hidden_layers
        early, last = recomputed_layers(aux_layers(config, num_layers), num_layers)
        files = tensor_files(folder)
        device = resolve_device(config.device)
        require_chain(whole, cure=cure)
        require_own_layers(config, whole, plain_layers(config, whole), (early, last), cure=cure)
        first, final = (
            build_slice(config, whole, slice_tensors(files, folder, layers), layers)
            for layers in (early, last)
        )
        return cls(
            first=nn.Module.to(first, device),
            final=nn.Module.to(final, device),
            early_layers=early,
            last_layers=last,
            load_seconds=time.monotonic() - started,
        )

    @property
    def num_bytes(self) -> int:
        """Return the size of the weights in memory."""
        tensors = [*self._first.parameters(), *self._final.parameters()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def recompute(self, stored: StoredStates) -> RecomputedStates:
        """Recompute the omitted states of one sequence: the bits of the capture."""
        return self.derive_together([stored])[0]

    @torch.inference_mode()
    def derive_together(self, sequences: Sequence[StoredStates]) -> list[RecomputedStates]:
        """Recompute the omitted states of several sequences, padded to the longest.

        A single one is not padded and gives the bits of the capture; several do up to rounding.
        """
        longest = max(len(stored.input_ids) for stored in sequences)
        ids = np.zeros((len(sequences), longest), np.int64)
        late = np.zeros((len(sequences), longest, sequences[0].late.shape[-1]), np.uint16)
        for row, stored in enumerate(sequences):
            ids[row, : len(stored.input_ids)] = stored.input_ids
            late[row, : len(stored.late)] = stored.late
        with self._lock:
            early = self._early(torch.from_numpy(ids))
            last = self._last(from_bfloat16_bits(late, dtype=self._final.dtype))
        return [
            RecomputedStates(
                early=to_bfloat16_bits(early[row, : len(stored.input_ids)]),
                last=to_bfloat16_bits(last[row, : len(stored.input_ids)]),
            )
            for row, stored in enumerate(sequences)
        ]

    def _early(self, input_ids: Tensor) -> Tensor:
        """Return the output [B, T, H] of the early aux layer, before any norm."""
        seen: list[Tensor] = []
        layers: nn.ModuleList = self._first.layers  # type: ignore[assignment]
        hook = layers[-1].register_forward_hook(
            lambda _module, _inputs, output: seen.append(
                output if isinstance(output, Tensor) else output[0]
            )
        )
        LengthRope.of(self._first.config).forget(self._first)
        try:
            self._first(input_ids=input_ids.to(self._first.device), use_cache=False)
        finally:
            hook.remove()
        return seen[0]

    def _last(self, late: Tensor) -> Tensor:
        """Return the state [B, T, H] after the final norm, for outputs of the late aux layer."""
        LengthRope.of(self._final.config).forget(self._final)
        outputs = self._final(inputs_embeds=late.to(self._final.device), use_cache=False)
        last: Tensor = outputs.last_hidden_state
        return last
