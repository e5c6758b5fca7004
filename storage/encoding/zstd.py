"""Zstandard frames, with fast settings for state planes. Any Zstandard decoder reads them.

Exponents of hidden states repeat by chance, never by structure: a match costs more bits than the
literals it replaces. A tiny hash table with long minimum matches almost switches matching off,
which leaves the entropy coder. Mantissas are noise, except where several samples begin with the
same tokens (a system prompt): there whole rows repeat, and a larger hash table finds them at the
speed of copying.
"""

import numpy as np
import zstandard
from numcodecs import zstd as numcodecs_zstd  # type: ignore[import-untyped]
from numpy.typing import NDArray


def _parameters(*, hash_log: int) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        window_log=22,
        hash_log=hash_log,
        chain_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        write_checksum=False,
        write_content_size=True,
    )


ENTROPY_ONLY = _parameters(hash_log=6)
REPEATED_ROWS = _parameters(hash_log=14)
GENERAL = zstandard.ZstdCompressionParameters.from_level(1)


class Frames:
    """A compressor for one kind of content that reuses its memory. Not thread-safe."""

    def __init__(self, parameters: zstandard.ZstdCompressionParameters = GENERAL) -> None:
        """Compress with these parameters."""
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)

    def compress(self, values: NDArray[np.generic]) -> bytes:
        """Return the bytes of a C-contiguous array as one frame that records their size."""
        return self._compressor.compress(values.data)


def decompress(frame: memoryview, into: NDArray[np.generic]) -> None:
    """Fill a C-contiguous array from a frame; ValueError unless it fits exactly."""
    size = zstandard.frame_content_size(frame)
    if size != into.nbytes:
        raise ValueError(f"a frame holds {size} bytes, expected {into.nbytes}")
    numcodecs_zstd.decompress(frame, into)
