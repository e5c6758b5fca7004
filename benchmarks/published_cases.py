"""Steps whose speed SpecForge published, for a comparison on the same shape.

Every token is supervised. Heads are not part of what was published: those of Llama models of the
same width are used. They change a hundredth of the arithmetic.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.step_case import Shape, StepCase

SOURCE = "SpecForge, one H200"
_TTT_LENGTH = 7
_VOCABULARY = 32000


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedCase:
    """One step."""

    shape: Shape
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    tokens_per_second: float

    def case(self, *, dtype: str, device: str) -> StepCase:
        """Return the step to measure."""
        return StepCase(
            shape=self.shape,
            ttt_length=_TTT_LENGTH,
            dtype=dtype,
            device=device,
            lengths=self.lengths,
            loss_mask=(True,) * sum(self.lengths),
        )


def _shape(hidden_size: int, intermediate_size: int, head_dim: int) -> Shape:
    return Shape(
        name=f"published-{hidden_size}",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=hidden_size // head_dim,
        num_kv_heads=8,
        head_dim=head_dim,
        vocab_size=_VOCABULARY,
        draft_vocab_size=_VOCABULARY,
    )


PUBLISHED = (
    PublishedCase(
        shape=_shape(2048, 8192, 64), lengths=(1024, 1024, 1024, 1024), tokens_per_second=53_419
    ),
    PublishedCase(
        shape=_shape(4096, 14336, 128), lengths=(128, 256, 512, 2048), tokens_per_second=25_400
    ),
)


def published_table(measured: Sequence[tuple[StepCase, float]]) -> Iterator[str]:
    """Yield the lines of a table of published speeds and ours.

    Args:
        measured: each step with its tokens per second of wall time here; others than the published
            ones are left out.

    """
    yield f"| shape, lengths, TTT | {SOURCE}: tokens/s | Eyas here: tokens/s | Eyas / published |"
    yield "|---" * 4 + "|"
    by_name = {one.shape.name: one for one in PUBLISHED}
    for case, rate in measured:
        if (published := by_name.get(case.shape.name)) is not None:
            speed = published.tokens_per_second
            yield (
                f"| {case.shape.name}, {'/'.join(map(str, case.lengths))}, {case.ttt_length} | "
                f"{speed:,.0f} | {rate:,.0f} | {rate / speed:.2f} |"
            )
