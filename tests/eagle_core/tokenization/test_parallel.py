"""Processes change nothing but the speed."""

from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import RejectedRecord
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.parallel import tokenize_in_processes


def conversations(num: int, taken: list[int]) -> Iterator[Conversation]:
    for number in range(num):
        taken.append(number)
        question = "<|im_end|>" if number % 50 == 7 else f"question {number}"
        yield Conversation(
            conversation_id=str(number),
            messages=(
                Message(role="user", content=question),
                Message(role="assistant", content=f"answer {number} " * (number % 9 + 1)),
            ),
        )


@pytest.fixture(scope="module")
def tokenizer(smollm2_tokenizer: PreTrainedTokenizerBase) -> ConversationTokenizer:
    return ConversationTokenizer(smollm2_tokenizer)


@pytest.mark.slow
def test_samples_and_rejections_come_in_the_same_order(tokenizer: ConversationTokenizer) -> None:
    def run(num_processes: int) -> tuple[list[str], list[str]]:
        rejected: list[RejectedRecord] = []
        samples = tokenize_in_processes(
            tokenizer,
            conversations(500, []),
            max_length=64,
            num_processes=num_processes,
            on_rejected=rejected.append,
        )
        return [sample.sample_id for sample in samples], [str(one) for one in rejected]

    assert run(1) == run(2)
    assert len(run(1)[1]) == 10


@pytest.mark.slow
def test_input_is_taken_as_it_is_needed(tokenizer: ConversationTokenizer) -> None:
    taken: list[int] = []
    samples = tokenize_in_processes(
        tokenizer, conversations(100_000, taken), max_length=64, num_processes=2
    )
    next(samples)
    samples.close()  # type: ignore[attr-defined]  # a generator
    assert len(taken) < 1000
