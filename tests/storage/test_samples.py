"""Sick samples are refused, by name and position."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from storage.errors import SampleRefusedError
from storage.samples import StoredSample, content_id, require_storable
from tests.storage.synthetic import bf16_bits, make_identity, make_samples

IDENTITY = make_identity()


def spoil(field: str, index: object, value: object) -> Callable[[StoredSample], StoredSample]:
    def change(sample: StoredSample) -> StoredSample:
        array = getattr(sample, field).copy()
        array[index] = value
        return replace(sample, **{field: array})

    return change


CASES = {
    "NaN": (spoil("aux_hidden_states", (3, 1, 5), 0x7FC0), "layer 5 holds NaN.*position 3"),
    "-NaN": (spoil("aux_hidden_states", (3, 1, 5), 0xFF81), "layer 5 holds NaN.*position 3"),
    "Inf": (
        spoil("last_hidden_state", (-2, 0), 0x7F80),
        "last_hidden_state holds NaN.*position {n-2}",
    ),
    "-Inf": (
        spoil("last_hidden_state", (-2, 0), 0xFF80),
        "last_hidden_state holds NaN.*position {n-2}",
    ),
    "zero": (spoil("aux_hidden_states", (4, 2), 0), "layer 8 is all zero at position 4"),
    "-zero": (spoil("aux_hidden_states", (4, 2), 0x8000), "layer 8 is all zero at position 4"),
    "constant": (spoil("last_hidden_state", -1, 0x3F80), "is constant at position {n-1}"),
    "token": (spoil("target_argmax", 2, 1000), "target_argmax is 1000 at position 2"),
    "negative": (spoil("target_argmax", 2, -1), "target_argmax is -1 at position 2"),
    "logsumexp": (spoil("target_logsumexp", 0, np.nan), "logsumexp is NaN.*position 0"),
    "id": (spoil("input_ids", 0, 999), "have the content id"),
    "shape": (lambda s: replace(s, target_argmax=s.target_argmax[1:]), r"target_argmax is int32"),
    "dtype": (
        lambda s: replace(s, input_ids=s.input_ids.astype(np.int64)),
        "input_ids is int64.*expected int32",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    change, message = CASES[name]
    sample = make_samples(1, seed=3)[0]
    require_storable(sample, IDENTITY)
    for back in (1, 2):
        message = message.replace(f"{{n-{back}}}", str(len(sample) - back))
    with pytest.raises(SampleRefusedError, match=message) as caught:
        require_storable(change(sample), IDENTITY)
    assert sample.sample_id in str(caught.value)


def test_largest_finite_values_are_fine() -> None:
    spread = spoil("last_hidden_state", (0, slice(0, 2)), bf16_bits(np.array([3.38e38, -3.38e38])))
    require_storable(spread(make_samples(1)[0]), IDENTITY)


def test_content_id_is_the_documented_digest() -> None:
    ids, mask = np.array([1, 2], dtype=np.int32), np.array([False, True])
    documented = b"\x01\0\0\0\x02\0\0\0" + b"\0\x01"  # ids little-endian, then mask bytes
    assert content_id(ids, mask) == xxhash.xxh3_128_hexdigest(documented)
