"""Select conversations by their content: which are used, and which of them are held out."""

import xxhash

from eagle_core.data.conversation import Conversation, content_key


def piece_key(conversation: Conversation) -> str:
    """Return the key shared by all pieces of one chat: ids `X_0`, `X_1`, ... map to the key of `X`.

    ShareGPT was published in such pieces. An id of another form maps to the content key.
    """
    stem, mark, number = conversation.conversation_id.rpartition("_")
    if not stem or not mark or not number.isdecimal():
        return content_key(conversation)
    return xxhash.xxh3_128_hexdigest(stem.encode())


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether the conversation with this content or piece key is held out.

    Depends on the key alone: adding data moves no conversation between splits, and a larger
    fraction only adds held-out ones.
    """
    return int(key[:13], 16) < fraction * 16**13  # 52 bits: exact in a float


def is_taken(key: str, weight: float) -> bool:
    """Return whether a source of this weight gives the conversation with this content key.

    Like `is_held_out`, and independent of it: other digits of the key decide.
    """
    return int(key[-13:], 16) < weight * 16**13
