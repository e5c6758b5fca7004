"""Numbers and pages that a person looks at."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.samples import TokenizedSample
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.sample_page import sample_as_text, statistics_page
from eagle_core.tokenization.statistics import gather_statistics


def sample(length: int, num_supervised: int, token: int = 1) -> TokenizedSample:
    return TokenizedSample(
        sample_id=str(length),
        input_ids=np.full(length, token, dtype=np.int32),
        loss_mask=np.arange(length) >= length - num_supervised,
    )


def test_everything_is_counted_once() -> None:
    samples = [sample(1, 1), sample(100, 60), sample(101, 1, token=2), sample(1600, 0)]
    statistics = gather_statistics(samples, max_length=1600, vocab_size=10)
    assert statistics.num_samples == statistics.bin_counts.sum() == 4
    assert statistics.bin_counts[:2].tolist() == [2, 1]  # 1 and 100, then 101
    assert statistics.bin_counts[-1] == statistics.num_at_limit == 1
    assert statistics.num_tokens == 1802
    assert statistics.supervised_fraction == 62 / 1802
    assert statistics.coverage([1, 2, 99]) == {1: 61 / 62, 2: 1.0, 99: 1.0}
    vocabulary = DraftVocabulary.build(statistics.token_counts, size=1)
    assert vocabulary.coverage(statistics.token_counts) == statistics.coverage([1])[1]
    table = statistics.as_markdown(sizes=[1])
    assert "| supervised | 62 (3.4%) |" in table
    assert "| up to 100 | 2 | █" in table


def test_nothing_is_no_error() -> None:
    statistics = gather_statistics([], max_length=1600, vocab_size=10)
    assert statistics.supervised_fraction == 0.0
    assert "| samples | 0 |" in statistics.as_markdown(sizes=[4])


@pytest.fixture(scope="module")
def tokenizer(smollm2_tokenizer: PreTrainedTokenizerBase) -> ConversationTokenizer:
    return ConversationTokenizer(smollm2_tokenizer)


def test_supervised_text_is_set_off_and_escaped(tokenizer: ConversationTokenizer) -> None:
    messages = (
        Message(role="system", content="s"),
        Message(role="user", content="<b>q</b>"),
        Message(role="assistant", content="1 < 2 é😀"),
    )
    (one,) = tokenizer.tokenize(Conversation(conversation_id="c", messages=messages))
    assert sample_as_text(one, tokenizer) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n<b>q</b><|im_end|>\n"
        "<|im_start|>assistant\n«1 < 2 é😀<|im_end|>»\n"
    )
    statistics = gather_statistics([one], max_length=64, vocab_size=tokenizer.vocab_size)
    page = statistics_page("a & b", statistics, [one], tokenizer, sizes=[100])
    assert "<mark>1 &lt; 2 é😀&lt;|im_end|&gt;</mark>" in page
    assert "&lt;b&gt;q&lt;/b&gt;" in page
    assert "<h1>a &amp; b</h1>" in page
    assert page.count("<rect") == 16
