"""Samples for visual inspection: the rendered text with the supervised tokens in colour."""

import html
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from eagle_core.samples import TokenizedSample
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.statistics import TokenStatistics

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; padding: 1rem; }
mark { background: #bfe8c5; color: #102a14; }
rect { fill: #3b82a0; }
text { font-size: 11px; fill: currentColor; }
:root { color-scheme: light dark; }
"""
_BAR_HEIGHT, _BAR_WIDTH, _LABEL_WIDTH = 18, 420, 90


def sample_as_text(sample: TokenizedSample, tokenizer: ConversationTokenizer) -> str:
    """Return the text with « before and » after supervised tokens."""
    return "".join(
        f"«{text}»" if supervised else text for text, supervised in _runs(sample, tokenizer)
    )


def statistics_page(
    title: str,
    statistics: TokenStatistics,
    samples: Sequence[TokenizedSample],
    tokenizer: ConversationTokenizer,
    *,
    sizes: Sequence[int],
) -> str:
    """Return a self-contained HTML page: totals, coverage, histogram, coloured samples.

    `sizes` are the draft vocabulary sizes whose coverage is shown.
    """
    coverage = "".join(
        f"<li>{share:.2%} of the supervised tokens in a draft vocabulary of {size:,}</li>"
        for size, share in statistics.coverage(sizes).items()
    )
    rendered = "".join(
        f"<h3>{sample.sample_id}, {len(sample):,} tokens</h3>"
        f"<pre>{_sample_as_html(sample, tokenizer)}</pre>"
        for sample in samples
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><ul>"
        f"<li>{statistics.num_samples:,} samples, {statistics.num_tokens:,} tokens</li>"
        f"<li>{statistics.supervised_fraction:.1%} of the tokens supervised</li>"
        f"<li>{statistics.num_at_limit:,} samples truncated at the limit</li>{coverage}</ul>"
        f"<h2>Lengths in tokens</h2>{_histogram(statistics)}"
        f"<h2>Samples, <mark>supervised tokens marked</mark></h2>{rendered}</html>"
    )


def _sample_as_html(sample: TokenizedSample, tokenizer: ConversationTokenizer) -> str:
    return "".join(
        f"<mark>{html.escape(text)}</mark>" if supervised else html.escape(text)
        for text, supervised in _runs(sample, tokenizer)
    )


def _runs(sample: TokenizedSample, tokenizer: ConversationTokenizer) -> Iterator[tuple[str, bool]]:
    """Yield text and whether it is supervised, for every run of equal mask."""
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8))) + 1
    for start, end in pairwise([0, *edges.tolist(), len(sample)]):
        yield tokenizer.decode(sample.input_ids[start:end]), bool(sample.loss_mask[start])


def _histogram(statistics: TokenStatistics) -> str:
    most = max(int(statistics.bin_counts.max()), 1)
    bars = []
    for row, count in enumerate(statistics.bin_counts.tolist()):
        y, width = row * _BAR_HEIGHT, _BAR_WIDTH * count / most
        bars.append(
            f'<text x="0" y="{y + 13}">up to {statistics.bin_edges[row + 1]:,}</text>'
            f'<rect x="{_LABEL_WIDTH}" y="{y + 2}" width="{width:.1f}" height="{_BAR_HEIGHT - 4}"/>'
            f'<text x="{_LABEL_WIDTH + width + 4:.1f}" y="{y + 13}">{count:,}</text>'
        )
    height = _BAR_HEIGHT * len(bars)
    return (
        f'<svg role="img" aria-label="Histogram of sample lengths" '
        f'width="{_LABEL_WIDTH + _BAR_WIDTH + 80}" height="{height}">{"".join(bars)}</svg>'
    )
