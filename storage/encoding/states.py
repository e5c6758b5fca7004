"""Hidden states as plain Zarr arrays, encoded with the store's profile.

Shapes: R rows, L layers (absent for the last hidden state), H hidden size; states are bfloat16 bits
in uint16. Inner chunks hold one layer each. `storage.profiles` has the table of profiles.
"""

from collections.abc import Mapping

import numpy as np

from storage.encoding import lossless, quantized, raw
from storage.encoding.state_rows import Bits, StateRows
from storage.encoding.zarr_arrays import LoadedArray, OpenObject
from storage.objects.buffer_pool import Allocate
from storage.profiles import PROFILES, ProfileName


def write_states(name: str, rows: StateRows, profile: ProfileName, open_object: OpenObject) -> None:
    """Write the arrays that hold `rows`; their names begin with `name`."""
    match PROFILES[profile].codec:
        case "raw":
            raw.write(name, rows, open_object)
        case "lossless":
            lossless.write(name, rows, open_object)
        case "quantized":
            quantized.write(name, rows, open_object, largest_code=PROFILES[profile].largest_code)


def decode_states(
    name: str,
    arrays: Mapping[str, LoadedArray],
    profile: ProfileName,
    allocate: Allocate = np.empty,
) -> Bits:
    """Return the bits [R, (L,) H] that were encoded; approximate for quantized profiles.

    In memory the rows of one layer are contiguous, not the layers of one row.

    Raises:
        KeyError: an array is absent.
        ValueError: the layouts of the arrays do not match, or a chunk does not decode.

    """
    match PROFILES[profile].codec:
        case "raw":
            return raw.decode(name, arrays, allocate)
        case "lossless":
            return lossless.decode(name, arrays, allocate)
        case "quantized":
            return quantized.decode(name, arrays, allocate)
