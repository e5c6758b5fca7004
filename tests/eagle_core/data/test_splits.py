"""Conversations that share a question or a chat are all held out, or none."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.splits import ChatGroups, is_held_out, question_key


def conversation(question: str, answer: str = "a", *, name: str = "") -> Conversation:
    return Conversation(
        conversation_id=name,
        messages=(
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        ),
    )


def test_the_key_is_that_of_the_first_question() -> None:
    one = conversation("q", "a")
    led = Conversation(
        conversation_id="x",
        messages=(
            Message(role="system", content="s"),
            *conversation(" q\n", "b").messages,
            *conversation("other").messages,
        ),
    )
    assert question_key(one) == question_key(led)
    assert question_key(one) != question_key(conversation("r", "a"))


@pytest.mark.parametrize("text", ["one", "two"])
def test_a_rendered_text_has_its_own_key(text: str) -> None:
    def key(rendered: str) -> str:
        return question_key(Conversation(conversation_id="", messages=(), rendered_text=rendered))

    assert (key(text) == key("one")) == (text == "one")


def groups_of(conversations: list[Conversation]) -> dict[str, set[str]]:
    groups = ChatGroups()
    members = [groups.add(one) for one in conversations]
    found: dict[str, set[str]] = defaultdict(set)
    for member, one in zip(members, conversations, strict=True):
        found[groups.key(member)].add(one.conversation_id)
    return found


def test_chats_that_begin_alike_meet_however_late() -> None:
    conversations = [
        conversation("q1", name="x_0"),
        conversation("continue", name="x_1"),
        conversation("continue", name="y_1"),
        conversation("q3", name="alone"),
        conversation("q3", "b", name="z_00"),
        conversation("q1", name="no piece"),
        conversation("q4", name="z_2"),
        conversation("q1", name="y_0"),
    ]
    groups = groups_of(conversations)
    assert sorted(map(sorted, groups.values())) == [
        ["alone", "z_00", "z_2"], ["no piece", "x_0", "x_1", "y_0", "y_1"],
    ]  # fmt: skip
    random.Random(0).shuffle(conversations)  # noqa: S311
    assert groups_of(conversations) == groups


def test_pieces_that_begin_in_the_middle_are_not_alike() -> None:
    conversations = [conversation("continue", name=f"{chat}_1") for chat in range(9)]
    assert len(groups_of(conversations)) == 9


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_groups_are_the_connected_ones(edges: list[tuple[int, int]]) -> None:
    """A chat may have several first pieces, as from several sources."""
    conversations = [conversation(f"q{question}", name=f"{chat}_0") for chat, question in edges]
    groups = ChatGroups()
    members = [groups.add(one) for one in conversations]
    labels = {chat: chat for chat, _ in edges}
    for _ in edges:  # the slow way: until nothing changes
        for chat, question in edges:
            same = [labels[other] for other, asked in edges if asked == question]
            labels[chat] = min(labels[chat], *same)
    keys = [groups.key(member) for member in members]
    expected = [labels[chat] for chat, _ in edges]
    assert [keys.index(key) for key in keys] == [expected.index(one) for one in expected]


def test_large_groups_are_held_out_as_often_as_small_ones() -> None:
    groups = ChatGroups()
    members = [
        [groups.add(conversation(f"q {chat}", name=f"{chat} {part}_0")) for part in range(20)]
        for chat in range(2000)
    ]
    assert all(len({groups.key(member) for member in chat}) == 1 for chat in members)
    share = sum(is_held_out(groups.key(chat[0]), 0.2) for chat in members) / len(members)
    assert abs(share - 0.2) < 0.03
