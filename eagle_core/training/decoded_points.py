"""What drafts of a run were worth in real decoding while it trained: `decoded.json` in its folder.

Each point belongs to one step and one draft: a run that repeats a step after a kill, bit for bit,
finds its point here. The file is replaced as a whole, or not at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, uint8

from eagle_core.atomic_files import write_text
from eagle_core.errors import CorruptError

DECODED_NAME = "decoded.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What real decoding with one draft gave."""

    acceptance_length: float
    """Tokens per verifying forward; 0 if every text ended before the first one."""
    acceptance_by_depth: tuple[float, ...]
    """P(drafted token i is accepted | those before it were), up to the deepest that was reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedPoint:
    """What real decoding gave after one step."""

    step: int
    draft: str
    """Digest of the weights."""
    prompts: str
    """Digest of the prompts, and of how they are decoded."""
    decoded: Decoded

    def scalars(self) -> dict[str, float]:
        """Return its figures, named as those on held-out states; depths count from 0 there."""
        by_depth = {
            f"decoding/acceptance_{depth}": share
            for depth, share in enumerate(self.decoded.acceptance_by_depth)
        }
        return {**by_depth, "decoding/acceptance_length": self.decoded.acceptance_length}


_POINTS = TypeAdapter(tuple[DecodedPoint, ...])


def read_points(run_path: Path) -> Sequence[DecodedPoint]:
    """Return the points of a run, the one that was decoded last at the end.

    Raises:
        CorruptError: the file is damaged.

    """
    path = run_path / DECODED_NAME
    try:
        return _POINTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        raise CorruptError(
            f"{path} is damaged ({error.errors(include_url=False)[0]['msg']}); restore it, or "
            "delete it: the run then knows only what it decodes from now on"
        ) from error


def add_points(run_path: Path, *points: DecodedPoint) -> None:
    """Write points, all of them or none; each replaces the one of the same step."""
    steps = {point.step for point in points}
    others = [one for one in read_points(run_path) if one.step not in steps]
    write_text(run_path / DECODED_NAME, _POINTS.dump_json((*others, *points), indent=2).decode())


def decoded_lengths(run_path: Path) -> Mapping[int, float]:
    """Return decoded acceptance lengths by step: those that compare with the last one.

    Points of other prompts, from before these settings changed, do not.
    """
    points = read_points(run_path)
    return {
        point.step: point.decoded.acceptance_length
        for point in points
        if point.prompts == points[-1].prompts
    }


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the xxh3_128 of tensors in main memory and of their names."""
    digest = xxhash.xxh3_128()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().view(uint8).numpy().data)
    return digest.hexdigest()
