"""The semantic probe: the target model's own predictions at a few positions of a shard.

Recorded from the model's output during generation, kept in the commit record, and recomputed later
from the stored bytes: states of the wrong layer, norm or sample cannot reproduce it. The caller
passes in, as `Recompute`, how to get from a last hidden state to a log-probability.

If a store omits states, a point also records some of their channels, as computed at generation.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from storage.bfloat16 import bf16_to_float
from storage.errors import SampleRefusedError
from storage.objects.sealed_json import digest_json
from storage.profiles import PROFILES
from storage.recompute import Recompute
from storage.records.identity import StoreIdentity
from storage.records.probe_point import NUM_CHANNELS, ProbePoint
from storage.samples import StoredSample, last_needed

NUM_POINTS = 8
"""Points per shard: wrong states miss nearly all of them, so more points would show nothing new."""

EARLY_TOLERANCE = 0.1
"""Relative error (L2) allowed in the recorded channels of the early aux state, since other hardware
rounds differently.

A padded batch changes them by less than 0.01 (SmolLM2 in float32); the state of another layer or
token is an unrelated vector.
"""


def probe_positions(
    shard_id: str, loss_masks: Mapping[str, NDArray[np.bool_]]
) -> Sequence[tuple[str, int]]:
    """Return up to `NUM_POINTS` supervised (sample id, position) of a shard, sorted.

    A pure function of the shard: a regenerated shard is probed at the same positions.
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
        sample = int(np.searchsorted(ends, index, side="right"))
        before = int(ends[sample]) - len(supervised[sample])
        points.append((sample_ids[sample], int(supervised[sample][index - before])))
    return points


def omitted_channels(
    aux_hidden_states: NDArray[np.uint16], last_hidden_state: NDArray[np.uint16], position: int
) -> tuple[int, ...]:
    """Return the channels that a point records of omitted states, from [T, A, H] and [T, H]."""
    early = aux_hidden_states[position, 0, :NUM_CHANNELS].tolist()
    last = last_hidden_state[position, :NUM_CHANNELS].tolist()
    return (*early, *last)


def require_probe(
    points: Sequence[ProbePoint], samples: Mapping[str, StoredSample], identity: StoreIdentity
) -> None:
    """Raise SampleRefusedError unless each point agrees with its sample."""
    for point in points:
        sample = samples.get(point.sample_id)
        if sample is None or not 0 <= point.position < len(sample):
            raise SampleRefusedError(f"{point}: the shard has no such token")
        if not last_needed(sample.loss_mask)[point.position]:
            raise SampleRefusedError(f"{point}: no supervised token needs this state; not stored")
        stored = int(sample.target_argmax[point.position])
        if point.argmax != stored:
            raise SampleRefusedError(
                f"{point}: argmax is {point.argmax}, but target_argmax is {stored}"
            )
        if not (math.isfinite(point.logprob) and point.logprob <= 0):
            raise SampleRefusedError(f"{point}: {point.logprob} is not a log-probability")
        if identity.omitted is not None and point.omitted != _channels_of(sample, point):
            raise SampleRefusedError(
                f"{point}: its channels of the omitted states differ from the sample's"
            )


def disagreements(
    points: Sequence[ProbePoint],
    samples: Mapping[str, StoredSample],
    recompute: Recompute,
    identity: StoreIdentity,
    *,
    exact: bool = False,
) -> Iterator[str]:
    """Yield one line for every point that the states of complete samples do not reproduce.

    With `exact`, omitted states must match the bits recorded at generation.
    """
    if not points:
        return
    tolerance_nats = PROFILES[identity.profile].tolerance_nats
    states = np.stack([samples[p.sample_id].last_hidden_state[p.position] for p in points])
    tokens = np.array([point.argmax for point in points], dtype=np.int32)
    found = recompute.log_probabilities(states, tokens)
    for point, logprob in zip(points, found.tolist(), strict=True):
        if not abs(logprob - point.logprob) <= tolerance_nats:  # NaN disagrees too
            yield (
                f"{point}: stored states give token {point.argmax} a log-probability of "
                f"{logprob:.2f}, the target gave {point.logprob:.2f}"
            )
        elif point.omitted:
            yield from _differences(point, samples[point.sample_id], identity, exact=exact)


def _differences(
    point: ProbePoint, sample: StoredSample, identity: StoreIdentity, *, exact: bool
) -> Iterator[str]:
    found = _channels_of(sample, point)
    if exact:
        # Quantization changes the last state.
        num = None if PROFILES[identity.profile].is_exact else NUM_CHANNELS
        if found[:num] != point.omitted[:num]:
            yield f"{point}: recomputed states differ in bits from the target's"
        return
    early, expected = (
        bf16_to_float(np.array(bits[:NUM_CHANNELS], np.uint16)) for bits in (found, point.omitted)
    )
    distance = float(np.linalg.norm(early - expected))
    if not distance <= EARLY_TOLERANCE * float(np.linalg.norm(expected)):
        yield f"{point}: the recomputed early aux state differs from the target's"


def _channels_of(sample: StoredSample, point: ProbePoint) -> tuple[int, ...]:
    return omitted_channels(sample.aux_hidden_states, sample.last_hidden_state, point.position)
