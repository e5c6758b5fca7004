"""What ends an answer: the token that follows it in context, or one on which a server stops."""

from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.tool_calls import ToolCall
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

QUESTION = Message(role="user", content="q")
ANSWER = Message(role="assistant", content="a")
CALL = Message(
    role="assistant", content="", tool_calls=(ToolCall(name="sky", arguments="{}", call_id="1"),)
)
RESULT = Message(role="tool", content="wet", name="sky", tool_call_id="1")
TOOLS = '[{"type": "function", "function": {"name": "sky", "parameters": {}}}]'


def tokenizer(
    template: str | dict[str, str],
    *,
    special: Sequence[str] = (),
    added: Sequence[str | AddedToken] = (),
    stop: Sequence[int | str] = (),
    eos: str | None = None,
) -> ConversationTokenizer:
    """Return a tokenizer of bytes with these added tokens."""
    alphabet = {byte: index for index, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(special))
    backend.add_tokens(
        [
            one if isinstance(one, AddedToken) else AddedToken(one, special=False, normalized=False)
            for one in added
        ]
    )
    base: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token=eos
    )
    base.chat_template = template
    stop_ids = [one if isinstance(one, int) else backend.token_to_id(one) for one in stop]
    return ConversationTokenizer(base, stop_ids=stop_ids)


def conversation(*messages: Message, tools: str = "") -> Conversation:
    return Conversation(conversation_id="c", messages=messages, tools=tools)


def spans(ours: ConversationTokenizer, one: Conversation) -> list[str]:
    """Return the supervised texts of all rows."""
    found = []
    for sample in ours.tokenize(one):
        text = ""
        for token, is_supervised in zip(sample.input_ids, sample.loss_mask, strict=True):
            if is_supervised:
                text += ours.token(int(token))
            elif text:
                found.append(text)
                text = ""
        found += [text] if text else []
    return found


def stops(ours: ConversationTokenizer) -> set[str]:
    return {ours.token(one) for one in ours.stop_ids}


TURNS = (
    "{% for m in messages %}<U>{{ m.role }}:{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments }}</call>"
    "{% endfor %}<E>{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<U>assistant:{% endif %}"


def test_a_template_that_always_ends_with_the_generation_prompt() -> None:
    """Command R7B's for tools: what is behind the end of turn is not the target's."""
    ours = tokenizer(
        TURNS + "<U>assistant:", special=["<U>", "<E>", "<call>", "</call>"], eos="<E>"
    )
    assert stops(ours) == {"<E>"}
    assert spans(ours, conversation(QUESTION, ANSWER, QUESTION, ANSWER)) == ["a<E>", "a<E>"]
    always = TURNS + "<U><A>"
    bot = tokenizer(
        always.replace("{{ m.role }}:", "{{ '<A>' if m.role == 'assistant' else m.role }}"),
        special=["<U>", "<E>", "<A>", "<call>", "</call>"],
        eos="<E>",
    )
    assert stops(bot) == {"<E>"}
    assert spans(bot, conversation(QUESTION, CALL)) == ["<call>sky{}</call><E>"]


@pytest.mark.parametrize("is_special", [True, False])
def test_nothing_behind_a_call_and_brackets_that_are_special_or_not(*, is_special: bool) -> None:
    template = (
        "{% for m in messages %}"
        "{{ {'user': '<U>', 'assistant': '<A>', 'tool': '<T>'}[m.role] }}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
    )
    brackets = ["<call>", "</call>"]
    ours = tokenizer(
        template,
        special=["<U>", "<A>", "<T>", *(brackets if is_special else [])],
        added=[] if is_special else brackets,
        stop=["<U>", "<T>"],
    )
    assert stops(ours) == {"<U>", "<T>"}
    twice = Message(role="assistant", content="", tool_calls=CALL.tool_calls * 2)
    assert spans(ours, conversation(QUESTION, twice)) == ["<call>sky</call><call>sky</call><T>"]
    assert spans(ours, conversation(QUESTION, CALL, RESULT, ANSWER)) == [
        "<call>sky</call><T>",
        "a<U>",
    ]


def test_an_ordinary_token_of_a_header_ends_nothing() -> None:
    template = (
        "{% for m in messages %}{{ '\n## ' + m.role + '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n## assistant\n' }}{% endif %}"
    )
    ours = tokenizer(template, special=["<E>"], added=["##"], eos="<E>")
    assert stops(ours) == {"<E>"}
    assert spans(ours, conversation(QUESTION, ANSWER, QUESTION, ANSWER)) == ["a", "a"]
    assert "its end is not supervised" in ours.ends_text()


def test_an_end_that_is_no_special_token_is_a_control_token_too() -> None:
    ours = tokenizer(TURNS + PROMPT, special=["<eot>"], added=["<U>", "<E>"], eos="<eot>")
    assert stops(ours) == {"<E>", "<eot>"}
    assert spans(ours, conversation(QUESTION, ANSWER, QUESTION, CALL)) == [
        "a<E>",
        "<call>sky{}</call><E>",
    ]
    with pytest.raises(RejectedRecord) as caught:
        ours.tokenize(conversation(QUESTION, Message(role="assistant", content="say <E> now")))
    assert caught.value.reason is Reason.SPECIAL_TOKEN_IN_TEXT


def test_a_stop_token_inside_an_answer_refuses_the_conversation() -> None:
    """Nemotron's: text and call of one turn are written as two."""
    template = TURNS.replace("<call>", "<E><U>assistant:<call>", 1) + PROMPT
    ours = tokenizer(template, special=["<U>", "<E>", "<call>", "</call>"], eos="<E>")
    look = Message(role="assistant", content="Let me look.", tool_calls=CALL.tool_calls)
    with pytest.raises(RejectedRecord, match="<E>, on which a server stops, is inside an answer"):
        ours.tokenize(conversation(QUESTION, look))
    assert spans(ours, conversation(QUESTION, ANSWER)) == ["a<E>"]


def test_a_second_call_that_is_not_written_drops_the_conversation() -> None:
    """Harmony's template writes one call per message."""
    template = TURNS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]") + PROMPT
    ours = tokenizer(template, special=["<U>", "<E>", "<call>", "</call>"], eos="<E>")
    assert spans(ours, conversation(QUESTION, CALL)) == ["<call>sky{}</call><E>"]
    twice = Message(role="assistant", content="", tool_calls=CALL.tool_calls * 2)
    with pytest.raises(RejectedRecord) as caught:
        ours.tokenize(conversation(QUESTION, twice))
    assert caught.value.reason is Reason.CALLS_NOT_RENDERED


def test_a_template_for_tools_that_needs_tools() -> None:
    """Command R+: its `tool_use` loops over the tools without asking whether there are any."""
    needs = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + TURNS + PROMPT
    ours = tokenizer(
        {"default": TURNS + PROMPT, "tool_use": needs},
        special=["<U>", "<E>", "<call>", "</call>"],
        eos="<E>",
    )
    assert spans(ours, conversation(QUESTION, ANSWER)) == ["a<E>"]
    called = conversation(QUESTION, CALL, RESULT, ANSWER, tools=TOOLS)
    assert spans(ours, called) == ["<call>sky{}</call><E>", "a<E>"]


def test_a_template_that_refuses_calls_without_tools_or_reasoning_keeps_its_conversations() -> None:
    refusing = (
        "{% for m in messages %}{% if m.tool_calls and not tools %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}"
        "{% if enable_thinking %}{{ raise_exception('never thinks') }}{% endif %}"
    )
    ours = tokenizer(
        refusing + TURNS + PROMPT, special=["<U>", "<E>", "<call>", "</call>"], eos="<E>"
    )
    called = conversation(QUESTION, CALL, RESULT, ANSWER, tools=TOOLS)
    assert spans(ours, called) == ["<call>sky{}</call><E>", "a<E>"]
    system = Message(role="system", content="q")  # also the question: its text alone says nothing
    assert spans(ours, conversation(system, QUESTION, ANSWER)) == ["a<E>"]


@pytest.mark.parametrize("odd", [-1, 99_999])
def test_stop_ids_that_are_no_tokens_are_left_out_and_named(odd: int) -> None:
    ours = tokenizer(TURNS + PROMPT, special=["<U>", "<E>"], eos="<E>", stop=[odd])
    assert stops(ours) == {"<E>"}
    assert f"[{odd}] are no tokens of this tokenizer" in ours.ends_text()
    assert max(ours.special_token_ids()) < ours.vocab_size


def test_an_end_that_takes_the_white_space_behind_it() -> None:
    template = (
        "{% for m in messages %}<U>{{ m.role }}:{{ m.content }}<E>"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}<U>assistant:{% endif %}"
    )
    ours = tokenizer(
        template,
        special=["<U>"],
        added=[AddedToken("<E>", special=True, rstrip=True, normalized=False)],
        eos="<E>",
    )
    assert spans(ours, conversation(QUESTION, ANSWER, QUESTION, ANSWER)) == ["a<E>", "a<E>"]


def test_a_call_that_ends_unlike_an_answer_ends_with_the_stop_token() -> None:
    """Command R7B: an answer closes its text first, a call its action; both end the turn."""
    template = (
        "{% for m in messages %}<U>{{ '<A>' if m.role == 'assistant' else m.role }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
        "{{ m.content or '' }}{{ '<R>' if m.role == 'assistant' and not m.tool_calls }}<E>"
        "{% endfor %}<U><A>"
    )
    ours = tokenizer(template, special=["<U>", "<A>", "<R>", "<E>", "<call>", "</call>"], eos="<E>")
    assert stops(ours) == {"<E>"}
    assert spans(ours, conversation(QUESTION, ANSWER)) == ["a<R><E>"]
    assert spans(ours, conversation(QUESTION, CALL)) == ["<call>sky</call><E>"]
