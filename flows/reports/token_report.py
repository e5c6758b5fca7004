"""What a person looks at before paying for hidden states: lengths, masks, vocabulary coverage.

An HTML page beside the token file, written once, and an artifact of the flow run with the same
figures and one sample's text.
"""

from pathlib import Path

from prefect.artifacts import create_markdown_artifact

from eagle_core.atomic_files import write_text
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.sample_page import sample_as_text, statistics_page
from eagle_core.tokenization.statistics import gather_statistics
from eagle_core.tokenization.token_file import TokenFile
from flows.reports import plots
from flows.reports import rows as report

_VOCABULARIES = (4_000, 8_000, 16_000, 32_000, 64_000)
_SAMPLES_SHOWN = 5
_TEXT_CHARACTERS = 3_000


def publish_token_report(
    file: TokenFile, tokenizer: ConversationTokenizer, *, max_length: int, title: str, key: str
) -> Path:
    """Write the page of a token file and publish its artifact, unless that is done already."""
    page = file.path.with_suffix(".html")
    if page.exists() or not len(file):
        return page
    statistics = gather_statistics(file, max_length=max_length, vocab_size=tokenizer.vocab_size)
    sizes = [size for size in _VOCABULARIES if size < tokenizer.vocab_size]
    shown = [file.fetch(row) for row in range(min(_SAMPLES_SHOWN, len(file)))]
    text = sample_as_text(shown[0], tokenizer)[:_TEXT_CHARACTERS]
    create_markdown_artifact(
        f"## {title}\n\n{statistics.as_markdown(sizes=sizes)}\n\nThe first sample, «what the draft "
        f"learns from» set off (more of them, in colour: `{page}`):\n\n"
        f"{_fenced(text)}",
        key=key,
        description=title,
    )
    lengths = plots.lengths(statistics.bin_edges.tolist(), statistics.bin_counts.tolist())
    report.publish_plot(f"Lengths: {title}", lengths, key=f"{key}-lengths")
    write_text(page, statistics_page(title, statistics, shown, tokenizer, sizes=sizes))
    return page


def _fenced(text: str) -> str:
    """Return a code block that no backticks in the text can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
