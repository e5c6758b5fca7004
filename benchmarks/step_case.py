"""One training step to measure: sizes, real masks, and tensors that are equal in every process.

Only shapes and masks determine the time of a step, so ids and states are random, from fixed seeds:
each process creates its own copy, and nothing large is transferred. The target's argmax is always
in the draft vocabulary. Imports nothing of Eyas, so that any environment with torch can load it.

Shapes: T tokens, H hidden, V target vocabulary, D draft vocabulary.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

STEP_DECAY = 0.8
RMS_NORM_EPS = 1e-5
ROPE_THETA = 10000.0
_WARM_UP_TOKENS = 32
_ARGMAX_WEIGHT = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of target and draft, which are equally wide."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(
        name="tiny",
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=2000,
        draft_vocab_size=500,
    ),
    "gemma": Shape(
        name="gemma",
        hidden_size=640,
        intermediate_size=2048,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        vocab_size=262144,
        draft_vocab_size=32000,
    ),
    "llama": Shape(
        name="llama",
        hidden_size=1024,
        intermediate_size=4096,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        draft_vocab_size=32000,
    ),
    "smollm2": Shape(
        name="smollm2",
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        draft_vocab_size=16384,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCase:
    """The input of one step."""

    shape: Shape
    ttt_length: int
    dtype: str
    """float32, or bfloat16: autocast over float32 weights."""
    device: str = "cpu"
    """Where the step runs: cpu or cuda."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    loss_mask: tuple[bool, ...]
    """[T] over the concatenated sequences."""

    @property
    def num_tokens(self) -> int:
        """Return T."""
        return len(self.loss_mask)

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the first token of each sequence, then T."""
        borders = [0]
        for length in self.lengths:
            borders.append(borders[-1] + length)
        return tuple(borders)

    def warm_up(self) -> "StepCase":
        """Return a small step that touches every weight."""
        num_tokens = _WARM_UP_TOKENS
        return replace(self, lengths=(num_tokens,), loss_mask=(True,) * num_tokens)

    def write(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "StepCase":
        """Read a case that `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            shape=Shape(**fields.pop("shape")),
            lengths=tuple(fields.pop("lengths")),
            loss_mask=tuple(fields.pop("loss_mask")),
            **fields,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTensors:
    """The target's outputs for the tokens of a case."""

    input_ids: Tensor
    """[T]"""
    loss_mask: Tensor
    """[T] bool"""
    aux_hidden_states: Tensor
    """[T, 3H]"""
    last_hidden_state: Tensor
    """[T, H] of unit mean square, so that a final norm without gain does not change it."""
    draft_choice: Tensor
    """[T] draft id of the target's argmax."""


def step_tensors(case: StepCase, draft_head: Tensor) -> StepTensors:
    """Return the tensors of `case`; `draft_head` is `draft_rows_of_target_head(case.shape)`."""
    size, num_tokens = case.shape.hidden_size, case.num_tokens
    draft_argmax = torch.randint(len(draft_head), (num_tokens,), generator=_generator("choice"))
    direction = torch.nn.functional.normalize(draft_head[draft_argmax], dim=-1)
    noise = torch.nn.functional.normalize(_normal("last", num_tokens, size), dim=-1)
    last = _ARGMAX_WEIGHT * direction + (1 - _ARGMAX_WEIGHT) * noise
    return StepTensors(
        input_ids=torch.randint(case.shape.vocab_size, (num_tokens,), generator=_generator("ids")),
        loss_mask=torch.tensor(case.loss_mask),
        aux_hidden_states=_normal("aux", num_tokens, 3 * size),
        last_hidden_state=torch.nn.functional.normalize(last, dim=-1) * size**0.5,
        draft_choice=draft_argmax,
    )


def draft_ids(shape: Shape) -> Tensor:
    """Return [D] the target's ids that the draft can propose, ascending."""
    return torch.arange(shape.draft_vocab_size) * (shape.vocab_size // shape.draft_vocab_size)


def draft_rows_of_target_head(shape: Shape) -> Tensor:
    """Return [D, H]."""
    return fill("target_head", torch.empty(shape.draft_vocab_size, shape.hidden_size))


def whole_target_head(shape: Shape) -> Tensor:
    """Return [V, H] with the rows above at `draft_ids`."""
    head = fill("target_head_rest", torch.empty(shape.vocab_size, shape.hidden_size))
    head[draft_ids(shape)] = draft_rows_of_target_head(shape)
    return head


@torch.no_grad()
def fill(name: str, weight: Tensor) -> Tensor:
    """Fill a weight in place: gains with 1, matrices with random values seeded by `name`."""
    if weight.ndim == 1:
        return weight.fill_(1.0)
    return weight.normal_(std=0.02, generator=_generator(name))


def _normal(name: str, *size: int) -> Tensor:
    return torch.randn(*size, generator=_generator(name))


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
