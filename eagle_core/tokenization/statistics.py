"""Statistics of tokenised data, to check before hidden states are computed.

Legend: V target vocabulary. Everything is counted in one pass over a stream of samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eagle_core.samples import TokenizedSample

_NUM_BINS = 16
_BAR_CHARACTERS = 30


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenStatistics:
    """Totals and the distribution of lengths."""

    num_samples: int
    num_tokens: int
    num_supervised: int
    num_at_limit: int
    """Samples of exactly `max_length` tokens: nearly all of them were truncated."""
    bin_edges: NDArray[np.int64]
    """[B + 1] in tokens; the first is 0, the last is `max_length`."""
    bin_counts: NDArray[np.int64]
    """[B] samples with edge < length <= next edge."""
    token_counts: NDArray[np.int64]
    """[V] how often each token is supervised."""

    @property
    def supervised_fraction(self) -> float:
        """Fraction of the tokens that is supervised."""
        return self.num_supervised / self.num_tokens if self.num_tokens else 0.0

    def coverage(self, sizes: Sequence[int]) -> Mapping[int, float]:
        """Map each draft vocabulary size to the fraction of supervised tokens that it covers."""
        frequent = np.sort(self.token_counts)[::-1].cumsum()
        total = max(int(frequent[-1]), 1)
        return {size: int(frequent[min(size, len(frequent)) - 1]) / total for size in sizes}

    def as_markdown(self, *, sizes: Sequence[int]) -> str:
        """Return totals, coverage and the histogram of lengths as Markdown tables."""
        lines = [
            "| what | value |",
            "|---|--:|",
            f"| samples | {self.num_samples:,} |",
            f"| tokens | {self.num_tokens:,} |",
            f"| supervised | {self.num_supervised:,} ({self.supervised_fraction:.1%}) |",
            f"| truncated at the limit | {self.num_at_limit:,} |",
            *(
                f"| supervised tokens in a draft vocabulary of {size:,} | {share:.2%} |"
                for size, share in self.coverage(sizes).items()
            ),
            "",
            "| tokens | samples | |",
            "|--:|--:|:--|",
        ]
        most = max(int(self.bin_counts.max()), 1)
        for edge, count in zip(self.bin_edges[1:], self.bin_counts, strict=True):
            bar = "█" * round(_BAR_CHARACTERS * int(count) / most)
            lines.append(f"| up to {edge:,} | {count:,} | {bar} |")
        return "\n".join(lines)


def gather_statistics(
    samples: Iterable[TokenizedSample], *, max_length: int, vocab_size: int
) -> TokenStatistics:
    """Return the statistics of `samples`, none longer than `max_length` tokens."""
    edges = np.linspace(0, max_length, _NUM_BINS + 1).astype(np.int64)
    lengths: list[int] = []
    token_counts = np.zeros(vocab_size, dtype=np.int64)
    for sample in samples:
        lengths.append(len(sample))
        found, times = np.unique(sample.input_ids[sample.loss_mask], return_counts=True)
        token_counts[found] += times
    bins = np.searchsorted(edges[1:], lengths)
    return TokenStatistics(
        num_samples=len(lengths),
        num_tokens=sum(lengths),
        num_supervised=int(token_counts.sum()),
        num_at_limit=lengths.count(max_length),
        bin_edges=edges,
        bin_counts=np.bincount(bins, minlength=_NUM_BINS),
        token_counts=token_counts,
    )
