"""The storage profiles: how states are encoded, and the tolerated error of decoded states.

To add a quantized profile, extend `PROFILES` and `ProfileName`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

ProfileName = Literal["lossless", "int8", "int6", "int4", "raw"]
DEFAULT_PROFILE: Final = "lossless"


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One way to encode states; implemented in `storage.encoding.states`."""

    codec: Literal["raw", "lossless", "quantized"]
    summary: str
    """The description shown to users."""
    tolerance_nats: float
    """Tolerated difference between a log-probability of decoded states and the target's own: a few
    times the difference measured with correct states (`benchmarks/probe.py`).

    On SmolLM2 the largest of 8,805 differences was 0.12 nats for bfloat16 states, 0.16 for int8,
    0.67 for int6, 2.4 for int4. States before the norm, of another layer or of the next token were
    at least 10 nats off in one of 8 points.
    """
    largest_code: int = 0
    """Quantized profiles only: codes are integers from `-largest_code` to `largest_code`."""

    @property
    def is_exact(self) -> bool:
        """Return whether decoding restores the exact bits."""
        return self.codec != "quantized"


PROFILES: Mapping[ProfileName, Profile] = {
    "lossless": Profile(
        codec="lossless", summary="bit-exact, in two thirds of the bytes", tolerance_nats=0.5
    ),
    "int8": Profile(
        codec="quantized",
        summary="half of the bytes, with an error below bfloat16 noise",
        tolerance_nats=1.0,
        largest_code=127,
    ),
    "int6": Profile(
        codec="quantized",
        summary="a third of the bytes, with a larger error",
        tolerance_nats=2.5,
        largest_code=31,
    ),
    "int4": Profile(
        codec="quantized",
        summary="a fifth of the bytes, with the largest error",
        tolerance_nats=6.0,
        largest_code=7,
    ),
    "raw": Profile(codec="raw", summary="uncompressed", tolerance_nats=0.5),
}
