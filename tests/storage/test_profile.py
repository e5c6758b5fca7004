"""Profiles: exact where they say so, close where they do not, and readable by stock Zarr."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage.profile import bf16_to_float, decode_states, encode_states
from storage.samples import StoredSample, last_needed
from storage.store import Store
from tests.storage.synthetic import bf16_bits, fill, make_identity, make_samples


def through(profile: str, bits: np.ndarray) -> np.ndarray:
    arrays = {array.name: array.values for array in encode_states(profile, "x", bits)}
    return decode_states(profile, "x", arrays)


@pytest.mark.parametrize("profile", ["raw", "lossless"])
def test_every_bit_pattern_survives(profile: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 2, 64)
    np.testing.assert_array_equal(through(profile, bits), bits)
    np.testing.assert_array_equal(through(profile, bits[:0]), bits[:0])


def test_int8_is_close_in_every_channel() -> None:
    rng = np.random.default_rng(0)
    scale = np.exp2(np.linspace(-8, 8, 100))  # 100 channels: the last group is a short one
    bits = bf16_bits(rng.normal(0, 1, (300, 3, 100)) * scale)
    expected, found = bf16_to_float(bits), bf16_to_float(through("int8", bits))
    error = np.sqrt(np.square(found - expected).mean(axis=(0, 1)))
    power = np.sqrt(np.square(expected).mean(axis=(0, 1)))
    # 1000-fold between the channels of a group leaves 1000**0.25 = 6-fold in relative error
    assert (error / power).max() < 6 * 0.01
    np.testing.assert_array_equal(through("int8", bits[:0]), bits[:0])


def test_stock_zarr_reads_lossless(store: Store, samples: list[StoredSample]) -> None:
    """The recipe of docs/store-format.md, with nothing of ours."""
    fill(store, samples[:1])
    (record,) = store.commits().values()
    group = zarr.open_group(Path(store.root.root) / "shards" / record.shard_id, mode="r")
    typical = group["aux_hidden_states_typical_exponents"][:].astype(np.uint16)
    exponents = (group["aux_hidden_states_exponents"][:] + typical) & 0xFF
    rotated = exponents << 8 | group["aux_hidden_states_mantissas"][:]
    np.testing.assert_array_equal(rotated >> 1 | rotated << 15, samples[0].aux_hidden_states)


def test_no_supervision_keeps_no_last_state(tmp_path: Path) -> None:
    from storage.samples import content_id

    sample = make_samples(1)[0]
    mask = np.zeros(len(sample), bool)
    sample = replace(sample, loss_mask=mask, sample_id=content_id(sample.input_ids, mask))
    store = Store.create(str(tmp_path / "s"), make_identity())
    fill(store, [sample])
    found = store.reader(store.publish([sample.sample_id])).fetch(0)
    assert found.last_present is not None
    assert not found.last_present.any()
    np.testing.assert_array_equal(found.aux_hidden_states, sample.aux_hidden_states)


def test_last_needed_covers_every_step_of_the_loss() -> None:
    mask = np.zeros(20, bool)
    mask[5] = True
    np.testing.assert_array_equal(np.flatnonzero(last_needed(mask)), np.arange(4, 13))
