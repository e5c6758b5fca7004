"""Zstandard frames that only entropy-code: what state planes need, several times faster.

Exponents of hidden states repeat by chance, never by structure: a match found there costs more bits
than the literals it replaces. A tiny hash table with long minimum matches all but switches matching
off. Frames are plain: any Zstandard decoder, and Zarr's own `zstd` codec, reads them.
"""

from functools import cached_property

import zstandard
from numcodecs.abc import Codec  # type: ignore[import-untyped]
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]
from zarr.codecs import ZstdCodec


class EntropyFrames(Codec):  # type: ignore[misc]
    """Encode with the tuned parameters; decode like any Zstandard frame."""

    codec_id = "zstd"

    def __init__(self) -> None:
        self._decoder = Zstd(level=1)

    def encode(self, buf: bytes | memoryview) -> bytes:
        """Return one frame that carries its content's size."""
        return zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(buf)

    def decode(self, buf: bytes, out: bytearray | None = None) -> bytes:
        """Return the content of a frame."""
        content: bytes = self._decoder.decode(buf, out)
        return content


_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=18,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    write_checksum=False,
    write_content_size=True,
)


class EntropyZstd(ZstdCodec):
    """Zarr's `zstd` codec, under that name in the metadata, with frames made by `EntropyFrames`."""

    @cached_property
    def _zstd_codec(self) -> EntropyFrames:
        return EntropyFrames()
