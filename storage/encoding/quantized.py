"""Integer profiles: `code * step[row, group] * scale[channel] + mean[channel]`.

Groups have 64 channels. A scale per row alone would erase channels: one channel often carries most
of a row's energy.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from storage.bfloat16 import BLOCK_VALUES, bf16_to_float, float_to_bf16, float_to_bf16_up
from storage.encoding import zstd
from storage.encoding.state_chunks import (
    chunks,
    chunks_of,
    empty_by_layer,
    padded_chunk,
    row_blocks,
    states_layout,
    write_calibration,
)
from storage.encoding.state_rows import Bits, StateRows
from storage.encoding.zarr_arrays import LoadedArray, OpenObject, write_array
from storage.objects.buffer_pool import Allocate

CALIBRATION_ROWS = 256
GROUP_CHANNELS = 64
SCALE_POWER = 0.75
"""1 gives equal relative error in all channels; between 0 and 1 the teacher's KL is smaller."""


def write(name: str, rows: StateRows, open_object: OpenObject, *, largest_code: int) -> None:
    """Write the arrays that hold `rows`."""
    mean, scale = _channel_statistics(rows)
    write_calibration(f"{name}_channel_mean", mean, open_object)
    write_calibration(f"{name}_channel_scale", scale, open_object)
    reciprocal = 1 / scale
    hidden, groups = rows.shape[-1], _num_groups(rows.shape[-1])
    entropy_only, general = zstd.Frames(zstd.ENTROPY_ONLY), zstd.Frames()
    values = _grouped_values(hidden, groups)
    codes = padded_chunk(rows.shape, np.int8)
    steps = np.empty((len(codes), groups), np.uint16)
    coded_steps: list[bytes] = []  # small: kept until the codes are written
    with write_array(states_layout(f"{name}_codes", rows.shape, np.int8), open_object) as writer:
        for chunk in chunks(rows.shape):
            codes[chunk.stop - chunk.first :] = 0
            steps[chunk.stop - chunk.first :] = 0
            for at, bits in rows.blocks(chunk.first, chunk.stop, chunk.layer):
                x = values[: len(bits)]
                np.subtract(bf16_to_float(bits), mean[chunk.layer], out=x[:, :hidden])
                x[:, :hidden] *= reciprocal[chunk.layer]
                grouped = x.reshape(len(bits), groups, GROUP_CHANNELS)
                largest = np.maximum(grouped.max(axis=2), -grouped.min(axis=2))
                steps[at] = float_to_bf16_up(largest / np.float32(largest_code))
                wide = bf16_to_float(steps[at])
                grouped *= (1 / np.where(wide == 0, 1, wide))[..., np.newaxis]
                np.rint(x, out=x)
                codes[at] = x[:, :hidden]
            writer.append(entropy_only.compress(codes))
            coded_steps.append(general.compress(steps))
    layout = states_layout(f"{name}_steps", (*rows.shape[:-1], groups), np.uint16, hidden=hidden)
    with write_array(layout, open_object) as writer:
        for coded in coded_steps:
            writer.append(coded)


def decode(name: str, arrays: Mapping[str, LoadedArray], allocate: Allocate) -> Bits:
    """Return the bits [R, (L,) H]; see `storage.encoding.states.decode_states` for errors."""
    coded_codes, coded_steps = arrays[f"{name}_codes"], arrays[f"{name}_steps"]
    mean = arrays[f"{name}_channel_mean"].whole().astype(np.float32)
    scale = arrays[f"{name}_channel_scale"].whole().astype(np.float32)
    bits = empty_by_layer(coded_codes.layout.shape, allocate)
    hidden, groups = bits.shape[-1], _num_groups(bits.shape[-1])
    code_plane, step_plane = coded_codes.scratch(), coded_steps.scratch()
    values = _grouped_values(hidden, groups)
    for chunk in chunks_of(coded_codes, coded_steps):
        codes = coded_codes.chunk(chunk.position, code_plane).reshape(-1, hidden)
        steps = coded_steps.chunk(chunk.position, step_plane).reshape(-1, groups)
        for at, row in row_blocks(chunk, hidden):
            x = values[: at.stop - at.start]
            x[:, :hidden] = codes[at]
            x.reshape(len(x), groups, GROUP_CHANNELS)[...] *= bf16_to_float(steps[at])[..., None]
            real = x[:, :hidden]
            real *= scale[chunk.layer]
            real += mean[chunk.layer]
            bits[row][(slice(None), *chunk.layer)] = float_to_bf16(real)
    return bits


def _channel_statistics(rows: StateRows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return [(L,) H] mean, and standard deviation to the power of `SCALE_POWER`, never zero."""
    step = max(1, rows.shape[0] // CALIBRATION_ROWS)
    sample = bf16_to_float(rows.every(step)).astype(np.float64)
    if not len(sample):
        return np.zeros(rows.shape[1:], np.float32), np.ones(rows.shape[1:], np.float32)
    mean = sample.mean(axis=0).astype(np.float32)
    deviation = np.sqrt(np.square(sample - mean).mean(axis=0))
    return mean, np.maximum(deviation**SCALE_POWER, 1e-6).astype(np.float32)


def _num_groups(hidden: int) -> int:
    return -(-hidden // GROUP_CHANNELS)


def _grouped_values(hidden: int, groups: int) -> NDArray[np.float32]:
    """Return a buffer for the rows of a block, [r, 64 * groups], with zeros after the channels."""
    values = np.empty((max(1, BLOCK_VALUES // hidden), groups * GROUP_CHANNELS), np.float32)
    values[:, hidden:] = 0
    return values
