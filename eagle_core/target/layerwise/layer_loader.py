"""Loads one decoder layer after the other into its slot; a thread reads the next one's weights."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.layer_pass import LayerSlot
from eagle_core.target.layerwise.layer_slices import build_slice, slice_tensors


@dataclass(kw_only=True, slots=True)
class PassTimes:
    """What passes took so far, in seconds."""

    total: float = 0.0
    reading: float = 0.0
    """In which a thread read weights, while a layer ran."""
    placing: float = 0.0
    """In which layers were put on the device."""
    running: float = 0.0
    """In which layers ran."""
    num_tokens: int = 0
    num_passes: int = 0

    def seconds(self, num_tokens: int) -> float:
        """Return what a pass of `num_tokens` takes by these times."""
        running = self.running / max(self.num_tokens, 1) * num_tokens
        passes = max(self.num_passes, 1)
        return max(self.reading / passes, running) + self.placing / passes


class LayerLoader:
    """Loads one layer after the other into its slot."""

    def __init__(
        self,
        slots: Sequence[LayerSlot],
        *,
        config: TargetConfig,
        whole: PretrainedConfig,
        files: Mapping[str, Path],
        folder: Path,
        device: torch.device,
    ) -> None:
        for number, slot in enumerate(slots):
            slot.number = number
        self._slots, self._config, self._whole = slots, config, whole
        self._files, self._folder, self._device = files, folder, device
        self.times = PassTimes()

    def in_turn(self) -> Iterator[None]:
        """Yield once for each layer, while it is in its slot."""
        with ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as reader:
            ahead = reader.submit(self._read, 0)
            for number, slot in enumerate(self._slots):
                tensors = ahead.result()
                began = time.monotonic()
                if number + 1 < len(self._slots):
                    ahead = reader.submit(self._read, number + 1)
                slot.loaded = [self._built(number, tensors)]
                del tensors
                self.times.placing += time.monotonic() - began
                try:
                    yield
                finally:
                    slot.loaded = []

    def _read(self, number: int) -> dict[str, Tensor]:
        """Read the weights of a layer from disk; only mapped, they would be read when used."""
        began = time.monotonic()
        layers = range(number, number + 1)
        is_pinned = self._device.type == "cuda"
        tensors = {
            name: tensor.pin_memory() if is_pinned else tensor.clone()
            for name, tensor in slice_tensors(
                self._files, self._folder, layers, with_embedding=False
            ).items()
        }
        self.times.reading += time.monotonic() - began
        return tensors

    def _built(self, number: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        part = build_slice(self._config, self._whole, tensors, range(number, number + 1))
        layers: nn.ModuleList = part.layers  # type: ignore[assignment]
        layer = layers[0]
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
        return layer.to(self._device, non_blocking=True)
