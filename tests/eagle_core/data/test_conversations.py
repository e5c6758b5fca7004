"""Normalisation, content keys and the split."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_core.data.conversation import Conversation, Message, content_key
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.data.normalise import normalise
from eagle_core.data.splits import is_held_out
from eagle_core.data.tool_calls import ToolCall


def sharegpt(*turns: tuple[str, str]) -> dict[str, object]:
    return {"id": "c1", "conversations": [{"from": who, "value": text} for who, text in turns]}


def openai(*turns: tuple[str, object]) -> dict[str, object]:
    return {"messages": [{"role": who, "content": text} for who, text in turns]}


def turns_of(record: object) -> list[tuple[str, str]]:
    conversation = normalise(record, location="here").conversation
    return [(message.role, message.content) for message in conversation.messages]


def test_sharegpt_and_openai_give_the_same_conversation() -> None:
    one = normalise(sharegpt(("human", "q"), ("gpt", "a")), location="x").conversation
    two = normalise(openai(("user", "q"), ("assistant", "a")), location="y").conversation
    assert one.messages == two.messages
    assert content_key(one) == content_key(two)
    assert one.conversation_id == "c1"
    assert two.conversation_id == content_key(two)  # nothing else names it


@pytest.mark.parametrize("name", ["gpt", "chatgpt", "bing", "bard", "assistant", "GPT", "model"])
def test_every_name_of_the_assistant(name: str) -> None:
    assert turns_of(sharegpt(("user", "q"), (name, "a")))[1] == ("assistant", "a")


def test_system_turn_and_tool_results_are_kept() -> None:
    record = openai(
        ("system", "s"), ("user", "q"), ("assistant", "call"), ("tool", "42"), ("assistant", "a")
    )
    assert [role for role, _ in turns_of(record)] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip


def test_fields_that_a_table_filled_with_null_do_not_count() -> None:
    turns = [
        {"role": None, "from": "human", "content": None, "value": "q", "tool_calls": None},
        {"role": None, "from": "gpt", "content": None, "value": "a", "reasoning_content": None},
    ]
    assert turns_of({"messages": None, "conversations": turns}) == [
        ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert turns_of(openai(("user", parts), ("assistant", "a")))[0] == ("user", "one two")


def test_leading_assistant_turns_and_trailing_turns_are_cut_and_said() -> None:
    record = sharegpt(("gpt", "lost"), ("human", "q"), ("gpt", "a"), ("human", "more"))
    normalised = normalise(record, location="x")
    assert [message.content for message in normalised.conversation.messages] == ["q", "a"]
    assert normalised.changes == (Change.LEADING_ASSISTANT_TURNS_CUT, Change.TRAILING_TURNS_CUT)


def test_a_system_turn_survives_the_cut_of_leading_assistant_turns() -> None:
    record = sharegpt(("system", "s"), ("gpt", "lost"), ("human", "q"), ("gpt", "a"))
    assert turns_of(record) == [("system", "s"), ("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", Reason.NOT_AN_OBJECT),
        (None, Reason.NOT_AN_OBJECT),
        ({"conversations": ["text"]}, Reason.NOT_AN_OBJECT),
        ({"text": "x"}, Reason.NO_MESSAGES),
        ({"conversations": []}, Reason.NO_MESSAGES),
        ({"conversations": "x"}, Reason.NO_MESSAGES),
        ({"conversations": [{"value": "x"}]}, Reason.UNKNOWN_ROLE),
        (sharegpt(("human", "q"), ("narrator", "a")), Reason.UNKNOWN_ROLE),
        (openai(("user", 3), ("assistant", "a")), Reason.NOT_TEXT),
        (openai(("user", [{"type": "image_url"}]), ("assistant", "a")), Reason.NOT_TEXT),
        (openai(("user", "\ud83d"), ("assistant", "a")), Reason.BROKEN_UTF8),
        (sharegpt(("human", "q")), Reason.NO_ASSISTANT_TURN),
        (sharegpt(("gpt", "a")), Reason.NO_ASSISTANT_TURN),
        (sharegpt(("system", "s")), Reason.NO_ASSISTANT_TURN),
        (sharegpt(("human", "  \n"), ("gpt", "a")), Reason.EMPTY_TURN),
        (openai(("user", "q"), ("assistant", None)), Reason.EMPTY_TURN),
        (sharegpt(("human", "q"), ("human", "q"), ("gpt", "a")), Reason.WRONG_ALTERNATION),
        (sharegpt(("human", "q"), ("gpt", "a"), ("gpt", "b")), Reason.WRONG_ALTERNATION),
        (sharegpt(("human", "q"), ("system", "s"), ("gpt", "b")), Reason.WRONG_ALTERNATION),
        (openai(("user", "q"), ("tool", "t"), ("assistant", "b")), Reason.WRONG_ALTERNATION),
    ],
)
def test_rejected_records_say_reason_and_place(record: object, reason: Reason) -> None:
    with pytest.raises(RejectedRecord) as caught:
        normalise(record, location="file.json, record 7")
    assert caught.value.reason is reason
    assert caught.value.location.startswith("file.json, record 7")
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - crosses process borders
    assert (copy.reason, copy.location, copy.detail, str(copy)) == (
        caught.value.reason, caught.value.location, caught.value.detail, str(caught.value),
    )  # fmt: skip


def conversation(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        conversation_id="",
        messages=tuple(
            Message(role=roles[index % 2], content=content)  # type: ignore[arg-type]
            for index, content in enumerate(contents)
        ),
    )


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_content_keys_are_equal_exactly_for_equal_turns(one: list[str], two: list[str]) -> None:
    equal = content_key(conversation(*one)) == content_key(conversation(*two))
    assert equal == (one == two)


def test_what_earlier_versions_read_has_its_key_of_then() -> None:
    """Journals of a target's answers find their conversations by it."""
    assert content_key(conversation("q", "a")) == "d92bc8bf0829866a211b16664a466df2"
    call = ToolCall(name="f", arguments="{}", call_id="c")
    long = Conversation(
        conversation_id="",
        tools='[{"name": "f"}]',
        messages=(
            Message(role="system", content="s"),
            Message(role="user", content="q"),
            Message(role="assistant", content="", reasoning_content="r", tool_calls=(call,)),
            Message(role="tool", content="x"),
            Message(role="assistant", content="a"),
        ),
    )
    assert content_key(long) == "096d8391158d2fd6f059b0a6f702ebbb"


@given(
    st.text(alphabet="0123456789abcdef", min_size=32, max_size=32),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
)
def test_a_larger_fraction_only_adds_to_the_held_out(key: str, one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert is_held_out(key, low) <= is_held_out(key, high)
    assert not is_held_out(key, 0.0)


def test_the_held_out_share_is_the_fraction() -> None:
    keys = [content_key(conversation(str(number), "a")) for number in range(20_000)]
    share = sum(is_held_out(key, 0.05) for key in keys) / len(keys)
    assert abs(share - 0.05) < 0.005
