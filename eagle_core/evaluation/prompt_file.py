"""Prompts from any file of questions, such as a benchmark's: one prompt per record.

Read like a data set: JSON, JSON lines, Parquet or CSV at any path or URL, a package's file, a hub
data set. A record holds `turns` (a list of texts; the first is the prompt), messages (those before
the first answer are kept), or columns such as `prompt`, `question`, or `instruction` with `input`.
Columns with an answer are not read. Turns and messages may be JSON text, as in a table. Reports
group by its `category`, if it has one. A record that is none of these is an error, never skipped.

Invariant: a prompt ends in a question. Turns in a column of the question are all of them the prompt
if the last one is a question: the answers before it are its context, as those of `history` are.
Otherwise they are a chat, and as of messages, those before the first answer are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from eagle_core.data.columns import KNOWN_COLUMNS, is_turn_list, speaker_of
from eagle_core.data.conversation import Conversation
from eagle_core.data.ledger import RejectedRecord
from eagle_core.data.normalise import normalise
from eagle_core.data.records.fields import holds_something, is_list, parsed
from eagle_core.data.source_record import DamagedRecord
from eagle_core.data.sources import read_strictly
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.evaluation.prompts import Prompt
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

_MESSAGE_KEYS = ("messages", "conversations", "conversation")
_TEXT_KEYS = ("prompt", "question", "instruction", "query", "problem", "input", "text")
_QUESTION_KEYS = frozenset(name for columns in KNOWN_COLUMNS for name in columns.question)
_ANSWER_KEYS = frozenset(name for columns in KNOWN_COLUMNS for name in columns.answer)
"""Not read: a benchmark's answer may be a number or a list."""


def read_prompts(source: str, tokenizer: ConversationTokenizer) -> Iterator[Prompt]:
    """Yield the prompts of a file in its order, each with the template's generation prompt.

    Raises:
        ConfigError: a record holds no question; names the record and the expected keys.
        CorruptError: the file is damaged, or a record is too large; names the record.

    """
    for record in read_strictly("prompts", source):
        if isinstance(record, DamagedRecord):
            raise CorruptError(
                f"{record.location} of {source} cannot be read ({record.reason}: {record.detail}); "
                "correct it or remove it from evaluation.prompts, then run again"
            )
        try:
            asked = asked_question(record.value, location=record.location)
            ids = tokenizer.prompt(asked.messages, tools=asked.tools)
        except RejectedRecord as error:
            raise ConfigError(
                f"{record.location} of evaluation.prompts is not a question: {error}; expected "
                f"`turns`, {', '.join(_MESSAGE_KEYS)}, or one of the columns "
                f"{', '.join(_TEXT_KEYS)}"
            ) from error
        yield Prompt(input_ids=tuple(ids.tolist()), category=category_of(record.value))


def asked_question(record: object, *, location: str) -> Conversation:
    """Return the conversation up to the first answer, or up to the question of columns.

    Raises:
        RejectedRecord: there is no question.

    """
    turns = None
    if isinstance(record, Mapping):
        turns = _turns(record)
        record = _columns(record) if turns is None else _with_turns(record, turns)
    asked = normalise(record, location=location, questions_suffice=True).conversation
    if turns is None:
        return asked
    # Pairs of question and answer are turns only now.
    before = takewhile(lambda message: message.role != "assistant", asked.messages)
    return replace(asked, messages=tuple(before))


def _turns(record: Mapping[str, object]) -> Sequence[object] | None:
    """Return the turns before the first answer; None if the question is in columns."""
    for key in (*_MESSAGE_KEYS, "turns"):
        turns = parsed(record.get(key))
        if not is_list(turns) or not holds_something(turns):
            continue
        if key == "turns" and not is_turn_list(turns):
            return [{"role": "user", "content": turns[0]}]
        return _before_answer(turns)
    return None


def _with_turns(record: Mapping[str, object], turns: Sequence[object]) -> dict[str, object]:
    unused = _ANSWER_KEYS.union(_MESSAGE_KEYS)
    others = {key: value for key, value in record.items() if key not in unused}
    return {**others, "messages": turns}


def _columns(record: Mapping[str, object]) -> dict[str, object]:
    """Return the columns without answers, and those of the question up to where one is due."""
    columns = {key: value for key, value in record.items() if key not in _ANSWER_KEYS}
    *usual, text = _TEXT_KEYS
    if isinstance(record.get(text), str) and not any(record.get(key) for key in usual):
        columns["prompt"] = columns.pop(text)
    return {
        key: _unanswered(value) if key in _QUESTION_KEYS else value
        for key, value in columns.items()
    }


def _unanswered(value: object) -> object:
    """Return a column of the question; of turns whose last is no question, those of the first."""
    turns = parsed(value)
    if not is_turn_list(turns) or None in map(speaker_of, turns):
        return value
    return turns if speaker_of(turns[-1]) == "user" else _before_answer(turns)


def _before_answer(turns: Sequence[object]) -> Sequence[object]:
    """Return the turns before the first answer, which may be damaged; a greeting is none."""
    roles = [speaker_of(parsed(turn)) for turn in turns]
    asked = roles.index("user") if "user" in roles else len(roles)
    return turns[: roles.index("assistant", asked)] if "assistant" in roles[asked:] else turns


def category_of(record: object) -> str:
    """Return the category of a record; empty if it has none."""
    found = record.get("category") if isinstance(record, Mapping) else None
    return found if isinstance(found, str) else ""
