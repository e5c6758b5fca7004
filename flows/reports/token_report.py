"""What to check before computing hidden states: lengths, masks, vocabulary coverage.

An HTML page beside the token file, and a summary in Markdown with the same figures and the text of
one sample.
"""

from dataclasses import dataclass
from pathlib import Path

from eagle_core.atomic_files import write_text
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.sample_page import sample_as_text, statistics_page
from eagle_core.tokenization.statistics import gather_statistics
from eagle_core.tokenization.token_file import TokenFile
from flows.reports import plots

_VOCABULARIES = (4_000, 8_000, 16_000, 32_000, 64_000)
_SAMPLES_SHOWN = 5
_TEXT_CHARACTERS = 3_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenReport:
    """The report on a token file in the Prefect UI."""

    markdown: str
    lengths: str
    """A histogram, in SVG."""


def page_path(file: TokenFile) -> Path:
    """Return the path of a token file's page."""
    return file.path.with_suffix(".html")


def write_token_report(
    file: TokenFile, tokenizer: ConversationTokenizer, *, max_length: int, title: str
) -> TokenReport:
    """Write the page of a token file that is not empty; return the report for the UI."""
    statistics = gather_statistics(file, max_length=max_length, vocab_size=tokenizer.vocab_size)
    sizes = [size for size in _VOCABULARIES if size < tokenizer.vocab_size]
    shown = [file.fetch(row) for row in range(min(_SAMPLES_SHOWN, len(file)))]
    text = sample_as_text(shown[0], tokenizer)[:_TEXT_CHARACTERS]
    page = page_path(file)
    write_text(page, statistics_page(title, statistics, shown, tokenizer, sizes=sizes))
    return TokenReport(
        markdown=f"## {title}\n\n{statistics.as_markdown(sizes=sizes)}\n\nThe first sample, with "
        f"«supervised text» marked (more samples, in colour: `{page}`):\n\n{_fenced(text)}",
        lengths=plots.lengths(statistics.bin_edges.tolist(), statistics.bin_counts.tolist()),
    )


def _fenced(text: str) -> str:
    """Return a code block that no backticks in the text can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
