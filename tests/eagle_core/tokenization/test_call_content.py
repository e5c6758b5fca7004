"""A call without text is written as servers write it, or refused as a call that is not written."""

import json
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.tool_calls import ToolCall
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

QUESTION = Message(role="user", content="Rain?")
CALL = Message(role="assistant", content="", tool_calls=(ToolCall(name="sky", arguments="{}"),))
RESULT = Message(role="tool", content="wet")
ANSWER = Message(role="assistant", content="Yes.")
TOOLS = '[{"type": "function", "function": {"name": "sky", "parameters": {}}}]'

HEAD = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
TAIL = (
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = "{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}"
SHOWN = {
    "concatenated": "{{ '' + message['content'] }}",
    "printed": "{{ message['content'] }}",
    "trimmed": "{{ message['content'] | trim }}",
    "stripped": "{{ message.content.strip() }}",
    "measured": "{% if message.content | length %}{{ message.content }}{% endif %}",
    "split": "{% if '</think>' in message.content %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}",
}
"""How templates of real families write the content of a turn."""
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
WITHOUT_CALLS = {name: HEAD + shown + TAIL for name, shown in SHOWN.items()} | {
    "alternating": ALTERNATING
}
WITH_CALLS = {name: HEAD + shown + CALLS + TAIL for name, shown in SHOWN.items()} | {
    "for tools only": HEAD + f"{SHOWN['concatenated']}{{% if tools %}}{CALLS}{{% endif %}}" + TAIL
}
ONLY_IF_NONE = (
    HEAD + "{% if message.content is none %}" + CALLS + "{% else %}{{ message.content }}"
    "{% endif %}" + TAIL
)


def conversation(*messages: Message) -> Conversation:
    return Conversation(conversation_id="c", messages=messages, tools=TOOLS)


@cache
def tokenizer(base: PreTrainedTokenizerBase, template: str) -> ConversationTokenizer:
    return ConversationTokenizer(base, TemplateConfig(chat_template=template))


def served(base: PreTrainedTokenizerBase, template: str) -> str:
    """Return what a server renders that gives templates '' as the content of the call."""
    messages: list[dict[str, Any]] = [
        one.as_openai() | {"content": one.content} for one in (QUESTION, CALL, RESULT, ANSWER)
    ]
    return str(
        base.apply_chat_template(
            messages, tools=json.loads(TOOLS), chat_template=template, tokenize=False
        )
    )


@pytest.mark.parametrize("template", WITHOUT_CALLS.values(), ids=WITHOUT_CALLS)
@pytest.mark.parametrize("messages", [(QUESTION, CALL), (QUESTION, CALL, RESULT, ANSWER)])
def test_a_template_without_calls_is_named_as_such(
    smollm2_tokenizer: PreTrainedTokenizerBase, template: str, messages: tuple[Message, ...]
) -> None:
    with pytest.raises(RejectedRecord, match="does not write its tool calls") as caught:
        tokenizer(smollm2_tokenizer, template).tokenize(conversation(*messages))
    assert caught.value.reason is Reason.CALLS_NOT_RENDERED


@pytest.mark.parametrize("template", WITH_CALLS.values(), ids=WITH_CALLS)
def test_a_template_that_needs_text_gets_empty_text(
    smollm2_tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    ours = tokenizer(smollm2_tokenizer, template)
    (sample,) = ours.tokenize(conversation(QUESTION, CALL, RESULT, ANSWER))
    expected = served(smollm2_tokenizer, template)
    assert ours.decode(sample.input_ids) == expected
    assert ours.decode(sample.input_ids[sample.loss_mask]) == "[sky]<|im_end|>Yes.<|im_end|>"
    prompt = ours.prompt((QUESTION, CALL, RESULT), tools=TOOLS)
    assert expected.startswith(ours.decode(prompt))


def test_a_template_that_writes_calls_only_without_content_gets_none(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    ours = tokenizer(smollm2_tokenizer, ONLY_IF_NONE)
    (sample,) = ours.tokenize(conversation(QUESTION, CALL, RESULT, ANSWER))
    assert "<|im_start|>assistant\n[sky]<|im_end|>" in ours.decode(sample.input_ids)


def test_a_template_that_refuses_an_order_with_calls_still_says_so(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    refusing = (
        "{{ raise_exception('no results') if messages | map(attribute='role') | list == "
        "['user', 'assistant', 'tool', 'assistant'] else '' }}"
    )
    ours = tokenizer(smollm2_tokenizer, refusing + WITH_CALLS["concatenated"])
    with pytest.raises(RejectedRecord, match="no results") as caught:
        ours.tokenize(conversation(QUESTION, CALL, RESULT, ANSWER))
    assert caught.value.reason is Reason.TEMPLATE_REFUSED


def test_only_templates_whose_calls_are_written_otherwise_get_new_token_files(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    def texts_in_calls(template: str) -> bool:
        ours = tokenizer(smollm2_tokenizer, template)
        return ours._formats.plain.fingerprint[4:] == [""]

    assert all(texts_in_calls(WITH_CALLS[name]) for name in WITH_CALLS)
    assert not any(texts_in_calls(one) for one in [*WITHOUT_CALLS.values(), ONLY_IF_NONE])
