"""The stack of decoder layers inside a causal language model, and what its layers give."""

import torch
from torch import Tensor, nn

LayerOutput = Tensor | tuple[Tensor, ...]

_INNER = ("model", "language_model")
"""Where classes keep it whose `get_decoder` stops one level above, as Llama 4's does."""


def find_decoder(model: nn.Module) -> nn.Module | None:
    """Return the module with the list `layers`, or what `get_decoder` gives if there is none."""
    get_decoder = getattr(model, "get_decoder", None)
    outer = get_decoder() if get_decoder else None
    if not isinstance(outer, nn.Module):
        return None
    candidates = [outer, *(getattr(outer, name, None) for name in _INNER)]
    candidates += [getattr(one, name, None) for one in candidates[1:] for name in _INNER]
    return next((one for one in candidates if _has_layers(one)), outer)


def _has_layers(module: object) -> bool:
    return isinstance(getattr(module, "layers", None), nn.ModuleList)


def state_of(output: LayerOutput, *, is_rounded: bool) -> tuple[Tensor, LayerOutput]:
    """Return the state in what a layer gives, and what the next layer reads.

    With `is_rounded`, both have the state rounded to bfloat16.
    """
    state = output if isinstance(output, Tensor) else output[0]
    if not is_rounded:
        return state, output
    state = state.to(torch.bfloat16).to(state.dtype)
    return state, state if isinstance(output, Tensor) else (state, *output[1:])
