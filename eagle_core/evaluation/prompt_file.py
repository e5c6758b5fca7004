"""Prompts from any file of questions, such as a benchmark's: one prompt per record.

Read like a data set: JSON, JSON lines, Parquet or CSV at any path or URL, a package's file, a hub
data set. A record holds `turns` (a list of texts; the first is the prompt), messages (those before
the first answer are kept), or a column such as `prompt` or `question`. Reports group by its
`category`, if it has one. A record that is none of these is an error, never skipped.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Message
from eagle_core.data.ledger import RejectedRecord
from eagle_core.data.normalise import normalise
from eagle_core.data.source_record import DamagedRecord
from eagle_core.data.sources import read_records
from eagle_core.errors import ConfigError
from eagle_core.evaluation.prompts import Prompt
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

_MESSAGE_KEYS = ("messages", "conversations", "conversation")
_TEXT_KEYS = ("prompt", "question", "instruction", "query", "problem", "input", "text")
_UNANSWERED = {"role": "assistant", "content": "-"}
"""Placeholder for the answer, so that a record passes the checks of a conversation."""


def read_prompts(source: str, tokenizer: ConversationTokenizer) -> Iterator[Prompt]:
    """Yield the prompts of a file in its order, each with the template's generation prompt.

    Raises:
        ConfigError: a record holds no question; names the record and the expected keys.
        CorruptError: the file is damaged.

    """
    for record in read_records(DatasetConfig(name="prompts", source=source)):
        assert not isinstance(record, DamagedRecord)  # noqa: S101 (damage is not accepted)
        try:
            messages = _question(record.value, location=record.location)
            ids = tokenizer.prompt(messages)
        except RejectedRecord as error:
            raise ConfigError(
                f"{record.location} of evaluation.prompts is not a question: {error}; expected "
                f"`turns`, {', '.join(_MESSAGE_KEYS)}, or one of the columns "
                f"{', '.join(_TEXT_KEYS)}"
            ) from error
        yield Prompt(input_ids=tuple(ids.tolist()), category=_category(record.value))


def _question(record: object, *, location: str) -> list[Message]:
    """Return the messages before the first answer."""
    if isinstance(record, Mapping):
        others = {key: value for key, value in record.items() if key not in _MESSAGE_KEYS}
        record = {**others, "messages": [*_turns(record), _UNANSWERED]}
    conversation = normalise(record, location=location).conversation
    return list(takewhile(lambda message: message.role != "assistant", conversation.messages))


def _turns(record: Mapping[str, object]) -> Sequence[object]:
    for key in _MESSAGE_KEYS:
        turns = record.get(key)
        if isinstance(turns, Sequence) and not isinstance(turns, str):
            is_answer = [str(_role(turn)).lower() in {"assistant", "gpt"} for turn in turns]
            return turns[: is_answer.index(True)] if any(is_answer) else turns
    asked = record.get("turns")
    if isinstance(asked, Sequence) and not isinstance(asked, str) and asked:
        return [{"role": "user", "content": asked[0]}]
    text = next((record[key] for key in _TEXT_KEYS if isinstance(record.get(key), str)), None)
    return [] if text is None else [{"role": "user", "content": text}]


def _role(turn: object) -> object:
    return turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None


def _category(record: object) -> str:
    found = record.get("category") if isinstance(record, Mapping) else None
    return found if isinstance(found, str) else ""
