"""What a record holds and its template does not write is refused, or kept and entered."""

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import LedgerEntry, Reason, RejectedRecord
from eagle_core.data.tool_calls import ToolCall
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from tests.tiny import CHAT_TEMPLATE

QUESTION = Message(role="user", content="Rain?")
ANSWER = Message(role="assistant", content="Yes.")
CALL = Message(role="assistant", content="", tool_calls=(ToolCall(name="sky", arguments="{}"),))
RESULT = Message(role="tool", content="wet")
TOOLS = '[{"type": "function", "function": {"name": "sky", "parameters": {}}}]'
NO_SYSTEM = (
    "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + CHAT_TEMPLATE
)


def conversation(*messages: Message, tools: str = "") -> Conversation:
    return Conversation(conversation_id="c", messages=messages, tools=tools)


def tokenizer(
    base: PreTrainedTokenizerBase, template: str = CHAT_TEMPLATE
) -> ConversationTokenizer:
    return ConversationTokenizer(base, TemplateConfig(chat_template=template))


def entered(ours: ConversationTokenizer, one: Conversation) -> list[str]:
    """Return the changes in the ledger, of a conversation that is kept."""
    entries: list[LedgerEntry] = []
    samples = list(ours.tokenize_all([one], max_length=2048, on_changed=entries.append))
    assert len(samples) == 1
    assert all(entry.conversation_id == "c" for entry in entries)
    return [entry.reason for entry in entries]


@pytest.mark.parametrize(
    "messages",
    [
        (QUESTION, CALL),
        (QUESTION, CALL, RESULT, ANSWER),
        (QUESTION, replace(CALL, content="Let me look."), RESULT, ANSWER),
        (QUESTION, ANSWER, QUESTION, replace(CALL, tool_calls=CALL.tool_calls * 2)),
    ],
)
def test_a_call_that_is_not_written_drops_the_conversation(
    smollm2_tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...]
) -> None:
    with pytest.raises(RejectedRecord, match="does not write its tool calls") as caught:
        tokenizer(smollm2_tokenizer).tokenize(conversation(*messages))
    assert caught.value.reason is Reason.CALLS_NOT_RENDERED


def test_a_call_is_written_where_only_its_arguments_are(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = CHAT_TEMPLATE.replace(
        "<|im_end|>",
        "{% for call in message.tool_calls or [] %}{{ call.function.arguments }}{% endfor %}"
        "<|im_end|>",
        1,
    )
    assert tokenizer(smollm2_tokenizer, template).tokenize(conversation(QUESTION, CALL))


def test_reasoning_tools_and_system_turn_that_are_not_written_are_entered(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    ours = tokenizer(smollm2_tokenizer, NO_SYSTEM)
    reasoned = replace(ANSWER, reasoning_content="I think.")
    system = Message(role="system", content="Be brief.")
    assert entered(ours, conversation(QUESTION, ANSWER)) == []
    assert entered(ours, conversation(QUESTION, reasoned)) == ["reasoning_not_rendered"]
    assert entered(ours, conversation(system, QUESTION, ANSWER)) == ["system_not_rendered"]
    assert entered(ours, conversation(QUESTION, ANSWER, tools=TOOLS)) == ["tools_not_rendered"]
    assert entered(ours, conversation(system, QUESTION, reasoned, tools=TOOLS)) == [
        "system_not_rendered",
        "reasoning_not_rendered",
        "tools_not_rendered",
    ]


def test_what_is_written_is_not_entered(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ tools | tojson if tools else '' }}" + CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message.reasoning_content }}{{ message['content'] }}"
    )
    ours = tokenizer(smollm2_tokenizer, template)
    reasoned = replace(ANSWER, reasoning_content=" I think.\n")
    for system in ("Be brief.", "Rain"):  # the second is in the question, too
        messages = (Message(role="system", content=system), QUESTION, reasoned)
        assert entered(ours, conversation(*messages, tools=TOOLS)) == []


def test_reasoning_that_is_dropped_by_the_settings_is_not_entered(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    config = TemplateConfig(chat_template=CHAT_TEMPLATE, reasoning="drop")
    ours = ConversationTokenizer(smollm2_tokenizer, config)
    assert entered(ours, conversation(QUESTION, replace(ANSWER, reasoning_content="Hm."))) == []


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("1 // (messages | length - 2)", "ZeroDivisionError"),
        ("2.0 ** (10000 if messages | length > 1 else 1)", "OverflowError"),
        ("'{0}'.format(*messages[2:])", "IndexError"),
        ("messages.pop()", "SecurityError"),
        ("messages[-1].content.encode('ascii')", "UnicodeEncodeError"),
        ("messages[-1].content.x.y", "UndefinedError"),
    ],
)
def test_whatever_a_template_raises_refuses_one_conversation(
    smollm2_tokenizer: PreTrainedTokenizerBase, expression: str, error: str
) -> None:
    template = (
        "{% if messages[0].content == 'é' %}{{ " + expression + " }}{% endif %}" + CHAT_TEMPLATE
    )
    odd = Message(role="user", content="é")
    rejected: list[RejectedRecord] = []
    samples = list(
        tokenizer(smollm2_tokenizer, template).tokenize_all(
            [conversation(odd, replace(ANSWER, content="é")), conversation(QUESTION, ANSWER)],
            max_length=100,
            on_rejected=rejected.append,
        )
    )
    assert len(samples) == 1
    assert [one.reason for one in rejected] == [Reason.TEMPLATE_REFUSED]
    assert error in rejected[0].detail


def supervised(ours: ConversationTokenizer, one: Conversation) -> list[str]:
    return [ours.decode(sample.input_ids[sample.loss_mask]) for sample in ours.tokenize(one)]


def test_answers_that_a_record_excludes_are_context_only(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    ours = tokenizer(smollm2_tokenizer)
    excluded = replace(ANSWER, content="Perhaps.", is_supervised=False)
    assert supervised(ours, conversation(QUESTION, excluded, QUESTION, ANSWER)) == [
        "Yes.<|im_end|>"
    ]
    assert supervised(ours, conversation(QUESTION, ANSWER, QUESTION, excluded)) == [
        "Yes.<|im_end|>"
    ]
    (sample,) = ours.tokenize(conversation(QUESTION, excluded, QUESTION, ANSWER))
    assert "Perhaps." in ours.decode(sample.input_ids)
    with pytest.raises(RejectedRecord, match="excludes every answer") as caught:
        ours.tokenize(conversation(QUESTION, excluded))
    assert caught.value.reason is Reason.TOO_FEW_SUPERVISED_TOKENS
