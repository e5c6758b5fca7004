"""Prompts from any file of questions, such as a benchmark's: one prompt per record.

Read like a data set: JSON, JSON lines, Parquet or CSV at any path or URL, a package's file, a hub
data set. A record holds `turns` (a list of texts; the first is the prompt), messages (those before
the first answer are kept), or columns such as `prompt`, `question`, or `instruction` with `input`.
Columns with an answer are not read. Reports group by its `category`, if it has one. A record that
is none of these is an error, never skipped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from eagle_core.data.columns import KNOWN_COLUMNS
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation
from eagle_core.data.ledger import RejectedRecord
from eagle_core.data.normalise import normalise
from eagle_core.data.source_record import DamagedRecord
from eagle_core.data.sources import read_records
from eagle_core.errors import ConfigError
from eagle_core.evaluation.prompts import Prompt
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

_MESSAGE_KEYS = ("messages", "conversations", "conversation")
_TEXT_KEYS = ("prompt", "question", "instruction", "query", "problem", "input", "text")
_ANSWER_KEYS = frozenset(name for columns in KNOWN_COLUMNS for name in columns.answer)
"""Not read: a benchmark's answer may be a number or a list."""


def read_prompts(source: str, tokenizer: ConversationTokenizer) -> Iterator[Prompt]:
    """Yield the prompts of a file in its order, each with the template's generation prompt.

    Raises:
        ConfigError: a record holds no question; names the record and the expected keys.
        CorruptError: the file is damaged.

    """
    for record in read_records(DatasetConfig(name="prompts", source=source)):
        assert not isinstance(record, DamagedRecord)  # noqa: S101 (damage is not accepted)
        try:
            asked = _question(record.value, location=record.location)
            ids = tokenizer.prompt(asked.messages, tools=asked.tools)
        except RejectedRecord as error:
            raise ConfigError(
                f"{record.location} of evaluation.prompts is not a question: {error}; expected "
                f"`turns`, {', '.join(_MESSAGE_KEYS)}, or one of the columns "
                f"{', '.join(_TEXT_KEYS)}"
            ) from error
        yield Prompt(input_ids=tuple(ids.tolist()), category=_category(record.value))


def _question(record: object, *, location: str) -> Conversation:
    """Return the conversation up to the first answer, or up to the question of columns."""
    turns = None
    if isinstance(record, Mapping):
        turns = _turns(record)
        unused = _ANSWER_KEYS if turns is None else _ANSWER_KEYS.union(_MESSAGE_KEYS)
        record = {key: value for key, value in record.items() if key not in unused}
        record |= {} if turns is None else {"messages": turns}
    asked = normalise(record, location=location, questions_suffice=True).conversation
    if turns is None:
        return asked
    before = takewhile(lambda message: message.role != "assistant", asked.messages)
    return replace(asked, messages=tuple(before))


def _turns(record: Mapping[str, object]) -> Sequence[object] | None:
    """Return the turns before the first answer; None if the question is in columns."""
    for key in _MESSAGE_KEYS:
        turns = record.get(key)
        if isinstance(turns, Sequence) and not isinstance(turns, str):
            is_answer = [str(_role(turn)).lower() in {"assistant", "gpt"} for turn in turns]
            return turns[: is_answer.index(True)] if any(is_answer) else turns
    asked = record.get("turns")
    if isinstance(asked, Sequence) and not isinstance(asked, str) and asked:
        return [{"role": "user", "content": asked[0]}]
    *usual, text = _TEXT_KEYS
    is_text = isinstance(record.get(text), str) and not any(record.get(key) for key in usual)
    return [{"role": "user", "content": record[text]}] if is_text else None


def _role(turn: object) -> object:
    return turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None


def _category(record: object) -> str:
    found = record.get("category") if isinstance(record, Mapping) else None
    return found if isinstance(found, str) else ""
