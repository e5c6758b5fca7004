"""One batch on its way through a decoder whose layers are loaded one by one.

The batch runs the decoder's own forward pass, in a greenlet that waits in front of every layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from eagle_core.target.decoder import LayerOutput, state_of


class LayerPass(greenlet):
    """One batch on its way through the decoder."""

    last: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        ids: Tensor,
        captured: Sequence[int],
        *,
        rounded: int | None,
        waits_in_main: bool,
    ) -> None:
        super().__init__()
        self._decoder, self._ids = decoder, ids
        self.num_tokens = ids.numel()
        self._captured, self._rounded = captured, rounded
        self._in_main = _InMain() if waits_in_main else None
        self.states: dict[int, Tensor] = {}

    def run(self) -> None:
        """Run the decoder's own forward pass."""
        output = self._decoder(input_ids=self._ids, use_cache=False)
        self.last = output.last_hidden_state.cpu()

    def wait(self, state: Tensor) -> None:
        """Let the others pass, until the next layer is loaded. `state` is what it will read."""
        assert self.parent is not None  # noqa: S101
        if self._in_main is None:
            self.parent.switch()
            return
        with self._in_main.keeping(state):
            self.parent.switch()

    def passed(self, layer: int, output: LayerOutput) -> LayerOutput:
        """Keep the output of a layer if it is wanted; return what the next layer reads."""
        state, output = state_of(output, is_rounded=layer == self._rounded)
        if layer in self._captured:
            self.states[layer] = state.to("cpu", copy=self._in_main is not None)
        return output


class _InMain:
    """A place in main memory for the state of one batch."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None

    @contextmanager
    def keeping(self, state: Tensor) -> Iterator[None]:
        """Hold the values of `state` within the block; its own memory is free for others."""
        if self._copy is None:
            self._copy = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        self._copy.copy_(state, non_blocking=True)
        storage = state.untyped_storage()
        num_bytes = storage.nbytes()
        storage.resize_(0)  # the frames that wait still refer to the tensor
        yield
        storage.resize_(num_bytes)
        state.copy_(self._copy, non_blocking=True)


class LayerSlot(nn.Module):
    """The place of a layer in the decoder: a batch waits here until the layer is loaded."""

    def __init__(self, plain: nn.Module) -> None:
        """Answer for the layer `plain`, which has no weights: decoders read its kind."""
        super().__init__()
        object.__setattr__(self, "_plain", plain)  # no part of the module: it cannot be moved
        self.number = 0
        self.loaded: list[nn.Module] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as torch has it)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_plain"], name)

    def forward(self, *inputs: object, **named: object) -> LayerOutput:
        """Wait for the layer, and pass through it."""
        batch = getcurrent()
        assert isinstance(batch, LayerPass)  # noqa: S101
        state = inputs[0] if inputs else named["hidden_states"]
        assert isinstance(state, Tensor)  # noqa: S101
        batch.wait(state)
        return batch.passed(self.number, self.loaded[0](*inputs, **named))
