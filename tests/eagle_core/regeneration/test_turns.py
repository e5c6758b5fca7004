"""Which turns are asked, and where the answers go."""

import pytest

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.tool_calls import ToolCall
from eagle_core.regeneration.turns import open_turns, with_answers


def conversation(*roles: str) -> Conversation:
    messages = tuple(
        Message(role=role, content=f"{role} {index}")  # type: ignore[arg-type]
        for index, role in enumerate(roles)
    )
    return Conversation(conversation_id="c", messages=messages)


@pytest.mark.parametrize(
    ("roles", "indices"),
    [
        (("user",), [1]),
        (("system", "user"), [2]),
        (("user", "assistant"), [1]),
        (("user", "assistant", "user"), [1, 3]),
        (("system", "user", "assistant", "user"), [2, 4]),
        (("user", "assistant", "tool", "assistant", "user"), [1]),
        (("system",), []),
        ((), []),
    ],
)
def test_questions_suffice(roles: tuple[str, ...], indices: list[int]) -> None:
    assert [turn.index for turn in open_turns(conversation(*roles))] == indices


def test_answers_follow_their_questions() -> None:
    new = [Message(role="assistant", content=f"new {number}") for number in range(2)]
    given = conversation("system", "user", "assistant", "user")
    full = with_answers(given, new)
    assert full is not None
    assert [message.content for message in full.messages] == [
        *("system 0", "user 1", "new 0", "user 3", "new 1")
    ]
    half = with_answers(given, new[:1])
    assert half is not None
    assert [message.role for message in half.messages] == ["system", "user", "assistant"]
    assert with_answers(given, []) is None


def test_a_call_is_an_answer() -> None:
    call = Message(role="assistant", content="", tool_calls=(ToolCall(name="f", arguments="{}"),))
    full = with_answers(conversation("user", "assistant", "tool", "assistant"), [call])
    assert full is not None
    assert full.messages[1:] == (call,)
