"""A call without text is written as servers write it, or refused as a call that is not written."""

import json
from dataclasses import replace
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


PRINTED = "{{ message.content }}"
JOINED = SHOWN["concatenated"] + CALLS
IF_NONE = "{% if message.content is none %}" + CALLS + "{% else %}" + PRINTED + "{% endif %}"
REFUSED = "{% if message.content == '' %}{{ raise_exception('no text') }}{% endif %}"


def by_tools(offered: str, otherwise: str) -> str:
    return HEAD + f"{{% if tools %}}{offered}{{% else %}}{otherwise}{{% endif %}}" + TAIL


STAYS_WITHOUT = {
    "unless tools are offered, it is printed": by_tools(IF_NONE, PRINTED),
    "without tools, it is joined and calls are not written": by_tools(
        IF_NONE, SHOWN["concatenated"]
    ),
    "a mark with the word": HEAD + IF_NONE.replace("none %}", "none %}<None>", 1) + TAIL,
}
"""Templates that lose a call with '', though None fails or reads as a word somewhere."""
BY_TOOLS = {
    "without tools, it is joined": by_tools(IF_NONE, JOINED),
    "with tools, it is joined": by_tools(JOINED, IF_NONE),
    "without tools, '' is refused": by_tools(PRINTED + CALLS, REFUSED + PRINTED + CALLS),
}
"""Templates that need '' in conversations of one kind, and None in those of the other."""
ONLY_SOMETIMES = {
    "two calls": HEAD + "{% if message.tool_calls and message.tool_calls | length > 1 %}"
    "{{ message.content.strip() }}{% else %}{{ message.content or '' }}{% endif %}" + CALLS + TAIL,
    "before the last question": HEAD + "{% if message.role == 'assistant' and "
    "messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list %}"
    "{{ message.content.split('</t>')[-1] }}{% else %}{{ message.content or '' }}{% endif %}"
    + CALLS + TAIL,
    "before the last question, printed": HEAD + "{% if loop.last or message.role == 'user' or "
    "not messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list %}"
    "{{ message.content or '' }}{% else %}{{ message.content }}{% endif %}" + CALLS + TAIL,
}  # fmt: skip
"""Templates that need '' in some turns only."""
TEXT_CALLS = (
    "{% for call in message.tool_calls or [] %}"
    "{{ '[' + call.function.name + call.function.arguments + ']' }}{% endfor %}"
)
AS_TEXT = {
    "only without content": HEAD + "{% if message.role == 'assistant' and message.content is none "
    "%}" + TEXT_CALLS + "{% else %}{{ message.content.split('</think>')[-1] }}{% endif %}" + TAIL,
    "behind the content": HEAD + "{% if message.content is not none %}{{ message.content }}"
    "{% endif %}" + TEXT_CALLS + TAIL,
    "content joined": HEAD + SHOWN["concatenated"] + TEXT_CALLS + TAIL,
    "with tools only": by_tools(PRINTED + TEXT_CALLS, PRINTED + CALLS),
}
"""Templates that join the arguments to text, as DeepSeek V3's and R1's do."""


def conversation(*messages: Message, tools: str = TOOLS) -> Conversation:
    return Conversation(conversation_id="c", messages=messages, tools=tools)


def supervised(ours: ConversationTokenizer, conversation: Conversation) -> list[str]:
    """Return what is supervised in each row."""
    return [ours.decode(one.input_ids[one.loss_mask]) for one in ours.tokenize(conversation)]


def forms(ours: ConversationTokenizer) -> list[object]:
    """Return what the names of token files say of the form of calls."""
    return ours._formats.plain.fingerprint[4:]


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
    def form(template: str) -> list[object]:
        return forms(tokenizer(smollm2_tokenizer, template))

    assert all(form(template) == [""] for template in WITH_CALLS.values())
    same = [*WITHOUT_CALLS.values(), *STAYS_WITHOUT.values(), ONLY_IF_NONE]
    assert not any(form(template) for template in same)
    others = [*BY_TOOLS.values(), *AS_TEXT.values()]
    assert not any(form(template) in ([], [""]) for template in others)


@pytest.mark.parametrize("template", STAYS_WITHOUT.values(), ids=STAYS_WITHOUT)
def test_a_template_that_loses_a_call_with_empty_text_gets_none(
    smollm2_tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    ours = tokenizer(smollm2_tokenizer, template)
    (answers,) = supervised(ours, conversation(QUESTION, CALL, RESULT, ANSWER))
    assert answers in ("[sky]<|im_end|>Yes.<|im_end|>", "<None>[sky]<|im_end|>Yes.<|im_end|>")


@pytest.mark.parametrize("template", BY_TOOLS.values(), ids=BY_TOOLS)
@pytest.mark.parametrize("tools", [TOOLS, ""])
def test_conversations_with_and_without_tools_may_need_other_forms(
    smollm2_tokenizer: PreTrainedTokenizerBase, template: str, tools: str
) -> None:
    ours = tokenizer(smollm2_tokenizer, template)
    spoken = conversation(QUESTION, CALL, RESULT, ANSWER, tools=tools)
    (answers,) = supervised(ours, spoken)
    refuses_text = template == BY_TOOLS["without tools, '' is refused"] and not tools
    assert answers == ("None" if refuses_text else "") + "[sky]<|im_end|>Yes.<|im_end|>"


@pytest.mark.parametrize("template", ONLY_SOMETIMES.values(), ids=ONLY_SOMETIMES)
def test_a_template_that_needs_text_in_some_turns_gets_it(
    smollm2_tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    ours = tokenizer(smollm2_tokenizer, template)
    both = replace(CALL, tool_calls=CALL.tool_calls * 2)
    spoken = conversation(QUESTION, both, RESULT, RESULT, ANSWER, QUESTION, CALL)
    answers = "".join(supervised(ours, spoken))
    assert answers == "[sky][sky]<|im_end|>Yes.<|im_end|>[sky]<|im_end|>"
    assert forms(ours) == [""]


@pytest.mark.parametrize("template", AS_TEXT.values(), ids=AS_TEXT)
@pytest.mark.parametrize("arguments", ["{}", '{"at": "é", "n": [1, null]}', "[1]", "not JSON"])
def test_a_template_that_needs_arguments_as_text_gets_them(
    smollm2_tokenizer: PreTrainedTokenizerBase, template: str, arguments: str
) -> None:
    ours = tokenizer(smollm2_tokenizer, template)
    call = replace(CALL, tool_calls=(ToolCall(name="sky", arguments=arguments),))
    (answers,) = supervised(ours, conversation(QUESTION, call, RESULT, ANSWER))
    assert answers == f"[sky{arguments}]<|im_end|>Yes.<|im_end|>"
    assert ours.decode(ours.prompt((QUESTION, call, RESULT), tools=TOOLS)).count(arguments) == 1


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("message.tool_calls[0].function.parameters + ''", "has no attribute 'parameters'"),
        ("message.tool_calls[0].function.arguments.place.name", "has no attribute 'place'"),
        ("raise_exception('one tool at a time')", "one tool at a time"),
    ],
)
def test_a_call_that_is_refused_for_itself_is_not_said_to_be_unknown(
    smollm2_tokenizer: PreTrainedTokenizerBase, written: str, reason: str
) -> None:
    shown = "{% if message.tool_calls and message.content is none %}{{ WRITTEN }}{% else %}"
    template = HEAD + shown.replace("WRITTEN", written) + PRINTED + "{% endif %}" + TAIL
    ours = tokenizer(smollm2_tokenizer, template)
    with pytest.raises(RejectedRecord, match=reason) as caught:
        ours.tokenize(conversation(QUESTION, CALL, RESULT, ANSWER))
    assert caught.value.reason is Reason.TEMPLATE_REFUSED
