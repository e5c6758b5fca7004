"""The semantic probe: what the target model itself said at a few positions of a shard.

Taken from the model's real output during generation, kept in the commit record, and recomputed from
the stored bytes later: states of the wrong layer, norm or sample cannot reproduce it. How to get
from a last hidden state to a log-probability is the caller's knowledge, handed in as `Recompute`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.canonical import digest_json
from storage.errors import SampleRefusedError
from storage.samples import StoredSample, last_needed

NUM_POINTS = 8
"""Points of one shard: wrong states miss nearly all of them, so that more would show no more."""

TOLERANCE_NATS: Mapping[str, float] = {"raw": 0.5, "lossless": 0.5, "int8": 1.0, "int6": 2.5}
"""By profile, about five times what right states were seen to differ by (`benchmarks/probe.py`).

On SmolLM2 the largest of 5,495 differences was 0.11 nats for bfloat16 states, 0.18 for int8, 0.48
for int6. States before the norm, of another layer or of the next token were at least 10 nats off
in one of 8 points.
"""

Recompute = Callable[[NDArray[np.uint16], NDArray[np.int32]], NDArray[np.float32]]
"""(last hidden states [K, H] as bfloat16 bits, token ids [K]) -> [K] log-probabilities in nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbePoint:
    """The target's own prediction after one token."""

    sample_id: str
    position: int
    """Index t of the token whose last hidden state predicts token t + 1."""
    argmax: int
    """Argmax of the target's logits at t over its full vocabulary."""
    logprob: float
    """Log-probability (nats) the target gave to `argmax` at t."""

    def __str__(self) -> str:
        """Return a form for error messages."""
        return f"probe at position {self.position} of sample {self.sample_id}"


def probe_positions(
    shard_id: str, loss_masks: Mapping[str, NDArray[np.bool_]]
) -> Sequence[tuple[str, int]]:
    """Return up to `NUM_POINTS` supervised (sample id, position) of a shard, sorted.

    A pure function of the shard: whoever makes it again asks the target at the same places.
    """
    sample_ids = sorted(loss_masks)
    supervised = [np.flatnonzero(loss_masks[sample_id]) for sample_id in sample_ids]
    ends = np.cumsum([len(positions) for positions in supervised])
    total = int(ends[-1]) if len(ends) else 0
    chosen: set[int] = set()
    for draw in itertools.count():
        if len(chosen) == min(NUM_POINTS, total):
            break
        chosen.add(int(digest_json(["probe", shard_id, draw]), 16) % total)
    points = []
    for index in sorted(chosen):
        place = int(np.searchsorted(ends, index, side="right"))
        before = int(ends[place]) - len(supervised[place])
        points.append((sample_ids[place], int(supervised[place][index - before])))
    return points


def require_probe(points: Sequence[ProbePoint], samples: Mapping[str, StoredSample]) -> None:
    """Raise SampleRefusedError unless each point fits what the samples themselves say."""
    for point in points:
        sample = samples.get(point.sample_id)
        if sample is None or not 0 <= point.position < len(sample):
            raise SampleRefusedError(f"{point}: the shard has no such token")
        if not last_needed(sample.loss_mask)[point.position]:
            raise SampleRefusedError(f"{point}: no supervised token needs this state, none is kept")
        stored = int(sample.target_argmax[point.position])
        if point.argmax != stored:
            raise SampleRefusedError(
                f"{point}: argmax is {point.argmax}, but target_argmax says {stored}"
            )
        if not (math.isfinite(point.logprob) and point.logprob <= 0):
            raise SampleRefusedError(f"{point}: {point.logprob} is no log-probability")


def disagreements(
    points: Sequence[ProbePoint],
    samples: Mapping[str, StoredSample],
    recompute: Recompute,
    *,
    tolerance_nats: float,
) -> Iterator[str]:
    """Yield one line for every point that the stored states do not reproduce."""
    if not points:
        return
    states = np.stack([samples[p.sample_id].last_hidden_state[p.position] for p in points])
    tokens = np.array([point.argmax for point in points], dtype=np.int32)
    found = recompute(states, tokens)
    for point, logprob in zip(points, found.tolist(), strict=True):
        if not abs(logprob - point.logprob) <= tolerance_nats:  # NaN disagrees too
            yield (
                f"{point}: stored states give token {point.argmax} a log-probability of "
                f"{logprob:.2f}, the target gave {point.logprob:.2f}"
            )
