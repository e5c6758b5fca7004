"""Profiles: exact where they say so, close where they do not, and readable by stock Zarr."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from storage.bfloat16 import bf16_to_float, float_to_bf16
from storage.encoding.state_rows import StateRows
from storage.encoding.states import decode_states, write_states
from storage.encoding.zarr_arrays import load_arrays
from storage.profiles import PROFILES, Profile
from storage.samples import StoredSample, last_needed
from storage.store import Store
from tests.storage.synthetic import (
    ObjectsInMemory,
    bf16_bits,
    data_key,
    fill,
    make_identity,
    make_samples,
)


def through(profile: str, *parts: np.ndarray) -> np.ndarray:
    objects = ObjectsInMemory()
    write_states("x", StateRows(parts), profile, objects.open)
    return decode_states("x", load_arrays(objects.written, what="test"), profile)


@pytest.mark.parametrize("profile", ["raw", "lossless"])
def test_every_bit_pattern_survives(profile: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 2, 64)
    np.testing.assert_array_equal(through(profile, bits), bits)
    np.testing.assert_array_equal(through(profile, bits[:0]), bits[:0])


@pytest.mark.parametrize("profile", ["raw", "lossless"])
@pytest.mark.parametrize("hidden", [2, 63, 576])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_many_chunks_of_many_parts_survive(
    profile: str, hidden: int, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.encoding.state_chunks.CHUNK_VALUES", 40 * hidden)
    monkeypatch.setattr("storage.encoding.state_rows.BLOCK_VALUES", 7 * hidden)
    monkeypatch.setattr("storage.encoding.state_chunks.BLOCK_VALUES", 7 * hidden)
    monkeypatch.setattr("storage.encoding.quantized.BLOCK_VALUES", 7 * hidden)
    rng = np.random.default_rng(0)
    shape = (num_layers, hidden) if num_layers else (hidden,)
    parts = [rng.integers(0, 1 << 16, (rows, *shape), dtype=np.uint16) for rows in (3, 0, 90, 1, 8)]
    np.testing.assert_array_equal(through(profile, *parts), np.concatenate(parts))


def test_rows_that_repeat_take_no_room() -> None:
    """Conversations that begin with the same system prompt have the same states there."""
    rng = np.random.default_rng(0)
    prompt, *answers = (bf16_bits(rng.normal(0, 1, (n, 2, 64))) for n in (200, 50, 50, 50, 50))
    sizes = []
    for parts in ([prompt, answers[0]], [part for answer in answers for part in (prompt, answer)]):
        objects = ObjectsInMemory()
        write_states("x", StateRows(parts), "lossless", objects.open)
        sizes.append(len(objects.written["x_mantissas/c.0.0.0"]))
    assert sizes[1] < sizes[0] + 3 * answers[0].nbytes // 2 + 3 * 200 * 2  # not 3 prompts more


@pytest.mark.parametrize(("profile", "steps"), [("int8", 254), ("int6", 62), ("int4", 14)])
def test_codes_are_close_in_every_channel(profile: str, steps: int) -> None:
    rng = np.random.default_rng(0)
    scale = np.exp2(np.linspace(-8, 8, 100))  # 100 channels: the last group is a short one
    mean = rng.normal(0, 20, 100) * scale  # far from zero, as the strongest channels are
    bits = bf16_bits(rng.normal(0, 1, (300, 3, 100)) * scale + mean)
    expected, found = bf16_to_float(bits), bf16_to_float(through(profile, bits))
    rounding = np.abs(expected) * 2.0**-8  # of bfloat16 itself
    error = np.sqrt(np.square(np.maximum(np.abs(found - expected) - rounding, 0)).mean((0, 1)))
    # 1000-fold between the channels of a group leaves 1000**0.25 = 6-fold in relative error
    assert (error / scale).max() < 6 * 2.5 / steps
    np.testing.assert_array_equal(through(profile, bits[:0]), bits[:0])


@pytest.mark.parametrize(("hidden", "num_tokens"), [(720, 900), (4000, 140), (63, 9000)])
def test_channels_need_not_fill_their_groups(hidden: int, num_tokens: int) -> None:
    """A block has as many rows as fit without the filling."""
    bits = bf16_bits(np.random.default_rng(0).normal(0, 1, (num_tokens, hidden)))
    found = bf16_to_float(through("int8", bits))
    np.testing.assert_allclose(found, bf16_to_float(bits), atol=0.1)


def test_float_to_bf16_rounds_to_nearest_even() -> None:
    wide = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0xBF80_7FFF, 0x8000_0000], np.uint32)
    nearest = np.array([0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x8000], np.uint16)
    np.testing.assert_array_equal(float_to_bf16(wide.view(np.float32)), nearest)


def test_stock_zarr_reads_lossless(store: Store, samples: list[StoredSample]) -> None:
    """The recipe of docs/store-format.md, with nothing of ours."""
    fill(store, samples[:1])
    (record,) = store.commits().values()
    path = f"{store.root.root}/{data_key(store, record.shard_id)}"
    group = zarr.open_group(ZipStore(path, mode="r"), mode="r")
    typical = group["aux_hidden_states_typical_exponents"][:].astype(np.uint16)
    exponents = (group["aux_hidden_states_exponents"][:] + typical) & 0xFF
    low = group["aux_hidden_states_mantissas"][:].astype(np.uint16)
    expected = (low & 0x80) << 8 | exponents << 7 | low & 0x7F
    np.testing.assert_array_equal(expected, samples[0].aux_hidden_states)


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


def test_a_quantized_profile_is_one_entry_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identity, encoding, probe and reading follow from it."""
    five = Profile(codec="quantized", summary="5 bits", tolerance_nats=4.0, largest_code=15)
    monkeypatch.setitem(PROFILES, "int5", five)  # type: ignore[arg-type,misc]
    samples = make_samples(6)
    store = Store.create(str(tmp_path / "store"), make_identity(profile="int5"))
    fill(store, samples)
    snapshot = store.publish([sample.sample_id for sample in samples])
    reader = Store.open(str(tmp_path / "store")).reader(snapshot)
    by_id = {sample.sample_id: sample for sample in samples}
    errors = {}
    for name in ("int6", "int5", "int4"):
        parts = [sample.aux_hidden_states for sample in samples]
        found = bf16_to_float(through(name, *parts)) - bf16_to_float(np.concatenate(parts))
        errors[name] = float(np.square(found).mean())
    assert errors["int6"] < errors["int5"] < errors["int4"]
    for row in range(len(samples)):
        found = reader.fetch(row)
        wanted = by_id[found.sample_id]
        np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
        away = bf16_to_float(found.aux_hidden_states) - bf16_to_float(wanted.aux_hidden_states)
        assert np.abs(away).max() < np.abs(bf16_to_float(wanted.aux_hidden_states)).max() / 4
