"""Do the states of a dump come from this target? Decided by running the target on a few rows.

Each stored state is compared with those of all layers, so that a dump of other layers, another norm
or another target is named as such. Rows are cut: under causal attention, the states of the first
tokens do not depend on the rest.

Shapes: T tokens, A aux layers, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.samples import HiddenStateSample, TokenizedSample, sample_id
from eagle_core.target.capture import CapturingTarget, capture_states

CHECKED_TOKENS = 128
WORST_ERROR = 1.0
"""Of one token. One flipped bit can make a state this wrong, and rounding cannot."""
MAX_ERROR = 0.2
"""Median over tokens of the relative error (L2). On SmolLM2-135M in bfloat16, other kernels differ
by 0.02, float8 with a scale per token by 0.03, and neighbouring layers by 0.25 or more."""
_FIRST_TOKENS = 1
"""Not compared: many targets have a huge state there that drowns all else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far a row's states are from the target's."""

    location: str
    errors: tuple[float, ...]
    """Relative error of each aux state, low to high, then of the last state."""
    nearest: tuple[int, ...]
    """The decoder layer whose output is nearest to each aux state."""
    layers: tuple[int, ...]
    """The aux layers that they should be of."""

    @property
    def problem(self) -> str:
        """What does not agree; empty if everything does."""
        errors = ", ".join(f"{error:.2g}" for error in self.errors)
        shown = f"relative errors {errors}"
        if max(self.errors) <= MAX_ERROR and self.nearest == self.layers:
            return ""
        *aux, last = self.errors
        if self.nearest != self.layers and last <= MAX_ERROR:
            return (
                f"its aux states are nearest to those of layers {list(self.nearest)}, not of "
                f"{list(self.layers)} ({shown})"
            )
        if max(aux) <= MAX_ERROR:
            return (
                "its aux states are the target's, but its last state is not: is it taken before "
                f"the final norm, or after it (--last-state)? ({shown})"
            )
        return f"its states are not the target's ({shown})"


def compare(
    target: CapturingTarget, samples: Sequence[HiddenStateSample], locations: Sequence[str]
) -> list[Agreement]:
    """Return the agreement of each sample with the target's own states."""
    cut = [_beginning(sample) for sample in samples]
    num_layers = int(target.model_config.num_hidden_layers)
    by_id = {
        found.sample_id: found for found in capture_states(target, cut, layers=range(num_layers))
    }
    return [
        _agreement(sample, by_id[part.sample_id], target.aux_layers, where)
        for sample, part, where in zip(samples, cut, locations, strict=True)
    ]


def _beginning(sample: HiddenStateSample) -> TokenizedSample:
    ids, mask = sample.input_ids[:CHECKED_TOKENS], sample.loss_mask[:CHECKED_TOKENS]
    return TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)


def _agreement(
    sample: HiddenStateSample, own: HiddenStateSample, layers: Sequence[int], location: str
) -> Agreement:
    every = _values(own.aux_hidden_states)
    stored = _values(sample.aux_hidden_states[: len(own)])
    errors, nearest = [], []
    for place, layer in enumerate(layers):
        found = stored[:, place]
        distances = [_error(found, every[:, one]) for one in range(every.shape[1])]
        nearest.append(int(np.argmin(distances)))
        errors.append(distances[layer])
    last = _values(sample.last_hidden_state[: len(own)])
    errors.append(_error(last, _values(own.last_hidden_state)))
    return Agreement(
        location=location, errors=tuple(errors), nearest=tuple(nearest), layers=tuple(layers)
    )


def difference(found: NDArray[np.uint16], expected: NDArray[np.uint16]) -> str:
    """Return how states [T, H] differ from recomputed ones; empty if only by rounding."""
    errors = _errors(_values(found), _values(expected))
    median, worst = float(errors.median()), float(errors.max())
    if median > MAX_ERROR:
        return f"relative error {median:.2g}"
    if not worst <= WORST_ERROR:
        at = int(errors.argmax()) + len(found) - len(errors)
        return f"relative error {worst:.2g} at position {at}"
    return ""


def _values(bits: NDArray[np.uint16]) -> Tensor:
    return from_bfloat16_bits(bits, dtype=torch.float32)


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the median over tokens of the relative distance between states [T, H]."""
    return float(_errors(found, expected).median())


def _errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return the relative distances of the tokens that are compared."""
    first = _FIRST_TOKENS if len(found) > _FIRST_TOKENS else 0
    distance = (found - expected)[first:].norm(dim=-1)
    relative: Tensor = distance / expected[first:].norm(dim=-1).clamp_min(1e-12)
    return relative
