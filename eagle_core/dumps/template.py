"""What the chat template says about token ids alone: the loss mask, and the first token."""

import numpy as np
from numpy.typing import NDArray

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

_OPENINGS = (
    (Message(role="user", content="Hello"),),
    (Message(role="system", content="Be brief."), Message(role="user", content="Why?")),
)


def template_mask(
    tokenizer: ConversationTokenizer, input_ids: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Return the mask [T] of the answers in ids that the chat template renders, or begins to.

    Raises:
        RejectedRecord: their text is not one that the template renders, or has other ids.

    """
    text = tokenizer.decode(input_ids)
    samples = tokenizer.tokenize(Conversation(conversation_id="", messages=(), rendered_text=text))
    for sample in samples:
        if np.array_equal(sample.input_ids[: len(input_ids)], input_ids):
            return sample.loss_mask[: len(input_ids)]  # engines omit what comes behind an answer
    detail = "the text of these tokens has other tokens; was the dump made with this tokenizer?"
    raise RejectedRecord(Reason.TEXT_NOT_OF_TEMPLATE, "", detail)


def first_token(tokenizer: ConversationTokenizer) -> int | None:
    """Return the token that every conversation begins with; None if there is no such token."""
    first = set()
    for messages in _OPENINGS:
        try:
            first.add(int(tokenizer.prompt(messages)[0]))
        except RejectedRecord:  # no system turns
            continue
    return first.pop() if len(first) == 1 else None
