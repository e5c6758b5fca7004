"""Select conversations: which are used, by their content, and which are held out.

Held out by their first question, or by the chat they are a piece of.
"""

from dataclasses import dataclass

import numpy as np
import xxhash

from eagle_core.data.conversation import Conversation, content_key

_HALF = 8
"""Bytes of a key that decide neither split nor order."""
_SHORTEST_PROMPT = 4
"""Token ids before the first answer that tell one question from another; a begin-of-text token and
a role's marker do not."""


def question_key(conversation: Conversation) -> str:
    """Return the key shared by all conversations with this first question, 32 hex digits.

    Blanks around the question do not count. Token ids have those before the first answer. Token
    ids with hardly any before it, and a rendered text, whose template is not known here, have their
    content key.
    """
    asked = (message.content for message in conversation.messages if message.role == "user")
    question = next(asked, None)
    if conversation.tokens is not None:
        mask = conversation.tokens.loss_mask
        prompt = conversation.tokens.input_ids[: mask.index(True)]
        if len(prompt) < _SHORTEST_PROMPT:
            return content_key(conversation)
        return xxhash.xxh3_128_hexdigest(np.array(prompt, np.int32).tobytes())
    if question is None:
        return content_key(conversation)
    return xxhash.xxh3_128_hexdigest(question.strip().encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One of the pieces, with ids `X_0`, `X_1`, ..., in which ShareGPT published long chats."""

    chat_key: str
    """The key shared by all pieces of the chat, 32 hex digits."""
    is_first: bool
    """Whether the chat begins with it."""


def piece_of(conversation: Conversation, *, source: str = "") -> Piece | None:
    """Return which piece of a chat the conversation is; None if its id has another form.

    `source` is the name of one of several sources: equal ids of two are two chats.
    """
    stem, mark, number = conversation.conversation_id.rpartition("_")
    if not stem or not mark or not number.isdecimal():
        return None
    chat = f"{source}: {stem}" if source else stem
    return Piece(chat_key=xxhash.xxh3_128_hexdigest(chat.encode()), is_first=not number.strip("0"))


class ChatGroups:
    """Groups of conversations that share a chat or a first question, directly or through others.

    The first question of a chat is that of its first piece: a later one begins with any turn, and
    hundreds begin with "continue". A group is known only after the last conversation: two chats can
    meet in any later one. Up to 300 bytes per conversation are in memory, as for the content keys
    of the duplicates.
    """

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes] = {}

    def add(self, conversation: Conversation, *, source: str = "") -> str:
        """Put the conversation into the group of its chat and of its first question.

        `source` is the name of one of several sources. Returns one of the keys of the group, for
        `key` after the last conversation.
        """
        piece = piece_of(conversation, source=source)
        if piece is None:
            return question_key(conversation)
        if piece.is_first:
            self._join(piece.chat_key, question_key(conversation))
        return piece.chat_key

    def key(self, member: str) -> str:
        """Return the key that all members of a group share, for what `add` returned."""
        return self._root(bytes.fromhex(member)).hex()

    def _join(self, one: str, two: str) -> None:
        roots = (self._root(bytes.fromhex(key)) for key in (one, two))
        # The key of a group is one of its keys, in whatever order they came. Other bytes than
        # those that decide the split select it: large groups are held out as often as small ones.
        first, second = sorted(roots, key=lambda key: (key[_HALF:], key))
        self._parents[second] = first

    def _root(self, key: bytes) -> bytes:
        path = []
        while (parent := self._parents.get(key, key)) != key:
            path.append(key)
            key = parent
        for passed in path:
            self._parents[passed] = key
        return key


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether conversations with this question or group key are held out.

    Depends on the key alone: adding data moves no conversation between splits (unless it joins
    groups), and a larger fraction only adds held-out ones.
    """
    return int(key[:13], 16) < fraction * 16**13  # 52 bits: exact in a float


def is_taken(key: str, weight: float) -> bool:
    """Return whether a source of this weight gives the conversation with this content key.

    Like `is_held_out`, and independent of it: other digits of the key decide.
    """
    return int(key[-13:], 16) < weight * 16**13
