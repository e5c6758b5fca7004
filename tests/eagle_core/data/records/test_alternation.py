"""What is cut, joined and refused where turns do not alternate."""

import pytest

from eagle_core.data.conversation import Message, Role
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.data.records.alternation import OrderedTurns, ordered
from eagle_core.data.tool_calls import ToolCall

_ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def turns(roles: str) -> list[Message]:
    return [
        Message(role=_ROLES[role], content=f"{role}{index}") for index, role in enumerate(roles)
    ]


def order(
    messages: list[Message], *, join_turns: bool = False, questions_suffice: bool = False
) -> OrderedTurns:
    return ordered(
        messages, location="x", join_turns=join_turns, questions_suffice=questions_suffice
    )


def contents(found: OrderedTurns) -> list[str]:
    return [message.content for message in found.messages]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("uua", ["u0\n\nu1", "a2"]),
        ("ssuaa", ["s0\n\ns1", "u2", "a3\n\na4"]),
        ("uatta", ["u0", "a1", "t2", "t3", "a4"]),
    ],
)
def test_equal_roles_are_joined_if_asked_for(roles: str, expected: list[str]) -> None:
    found = order(turns(roles), join_turns=True)
    assert contents(found) == expected
    assert (Change.TURNS_JOINED in found.changes) == (len(expected) < len(roles))


def test_joined_turns_keep_calls_and_reasoning() -> None:
    call = ToolCall(name="f", arguments="{}")
    said = Message(role="assistant", content="Let me look.", reasoning_content="hm")
    called = Message(role="assistant", content="", reasoning_content="so", tool_calls=(call,))
    found = order([*turns("u"), said, called], join_turns=True)
    assert found.messages[1] == Message(
        role="assistant", content="Let me look.", reasoning_content="hm\n\nso", tool_calls=(call,)
    )


CALL = (ToolCall(name="f", arguments="{}"),)


@pytest.mark.parametrize(
    "second",
    [
        Message(role="assistant", content="It rains."),
        Message(role="assistant", content="", reasoning_content="hm", tool_calls=CALL),
        Message(role="assistant", content="And the sea.", tool_calls=CALL),
    ],
)
def test_what_follows_a_call_is_not_joined_before_it(second: Message) -> None:
    called = Message(role="assistant", content="", tool_calls=CALL)
    with pytest.raises(RejectedRecord, match="said after it") as caught:
        order([*turns("u"), called, second], join_turns=True)
    assert caught.value.reason is Reason.WRONG_ALTERNATION


def test_calls_one_after_another_are_joined() -> None:
    called = Message(role="assistant", content="", tool_calls=CALL)
    found = order([*turns("u"), called, called], join_turns=True)
    assert found.messages[1].tool_calls == CALL * 2


def test_turns_of_which_one_is_supervised_are_not_joined() -> None:
    unsupervised = Message(role="assistant", content="x", is_supervised=False)
    with pytest.raises(RejectedRecord) as caught:
        order([*turns("ua"), unsupervised], join_turns=True)
    assert caught.value.reason is Reason.WRONG_ALTERNATION


@pytest.mark.parametrize(
    ("roles", "kept", "changes"),
    [
        ("u", "u", ()),
        ("su", "su", ()),
        ("uau", "uau", ()),
        ("uat", "ua", (Change.TRAILING_TURNS_CUT,)),
        ("aau", "u", (Change.LEADING_ASSISTANT_TURNS_CUT,)),
    ],
)
def test_a_question_at_the_end_stays_where_questions_suffice(
    roles: str, kept: str, changes: tuple[Change, ...]
) -> None:
    found = order(turns(roles), questions_suffice=True)
    assert [message.role[0] for message in found.messages] == list(kept)
    assert found.changes == changes


@pytest.mark.parametrize("roles", ["u", "su", "s", "a", "sa", "au"])
def test_for_training_an_answer_is_needed(roles: str) -> None:
    with pytest.raises(RejectedRecord) as caught:
        order(turns(roles))
    assert caught.value.reason is Reason.NO_ASSISTANT_TURN


@pytest.mark.parametrize("roles", ["s", "a", "sa"])
def test_a_question_is_always_needed(roles: str) -> None:
    with pytest.raises(RejectedRecord) as caught:
        order(turns(roles), questions_suffice=True)
    assert caught.value.reason is Reason.NO_ASSISTANT_TURN
