"""Records with question and answer in columns (Alpaca, Dolly, GSM8K, TRL, ...), as turns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeGuard

from eagle_core.data.conversation import Role
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.records.fields import Fields, Notes, holds_something, is_list, parsed
from eagle_core.data.records.roles import speaker
from eagle_core.data.records.turn import ROLE_KEYS

_PAIR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Columns of the question and of the answer; several are joined by line breaks."""

    question: tuple[str, ...]
    answer: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    """Columns that may be missing or empty."""

    def fit(self, record: Fields) -> "Fit":
        """Return how much of question and answer the record holds."""
        names = (*self.question, *self.answer)
        is_asked = any(map(record.holds, self.question))
        if all(name in self.optional or record.exists(name) for name in names):
            if not is_asked:
                return Fit.BLANK
            return Fit.ANSWERED if any(map(record.holds, self.answer)) else Fit.BLANK_ANSWER
        missing = [name for name in self.question if not record.exists(name)]
        return Fit.QUESTION if is_asked and self.optional.issuperset(missing) else Fit.NONE


class Fit(IntEnum):
    """How much of question and answer a record holds, in ascending order."""

    NONE = 0
    BLANK = 1
    """The columns exist, and there is no question in them."""
    QUESTION = 2
    """A question, and no column with an answer."""
    BLANK_ANSWER = 3
    ANSWERED = 4


KNOWN_COLUMNS: Sequence[Columns] = (
    Columns(
        question=("instruction", "input"), answer=("output",), optional=frozenset({"input"})
    ),  # Alpaca, CodeAlpaca, opc-sft-stage1
    Columns(
        question=("instruction", "context"), answer=("response",), optional=frozenset({"context"})
    ),  # Magicoder, Dolly
    Columns(question=("prompt",), answer=("response",)),
    Columns(question=("prompt",), answer=("completion",)),
    Columns(question=("query",), answer=("response",)),  # MetaMath
    Columns(question=("question",), answer=("answer",)),  # GSM8K
    Columns(question=("problem",), answer=("solution",)),  # MATH
    Columns(question=("input",), answer=("output",)),  # OpenCodeInstruct
    Columns(question=("message_1",), answer=("message_2",)),  # CAMEL
    Columns(question=("question",), answer=("response",)),
)
"""The first of those that fit best is taken."""


def is_asked(record: Fields, *, questions_suffice: bool = False) -> bool:
    """Return whether the usual columns hold a question, and its answer unless questions suffice."""
    needed = Fit.QUESTION if questions_suffice else Fit.ANSWERED
    return any(columns.fit(record) >= needed for columns in KNOWN_COLUMNS)


def as_turns(
    record: Fields, columns: Columns | None, *, location: str, questions_suffice: bool = False
) -> list[object] | None:
    """Return the turns of question and answer, after those of `history`; None without columns.

    Without `columns`, the usual names are tried. A question whose answer has no column is its only
    turn, and with `questions_suffice` also one whose answer is empty. Question and answer may be
    lists of turns themselves, as in TRL, or their JSON text. Other values than text are passed on:
    `normalise` refuses them. Raises `RejectedRecord` where columns cannot be joined.
    """
    candidates = KNOWN_COLUMNS if columns is None else (columns,)
    # A table of several forms has the columns of all of them, filled with null.
    chosen = max(candidates, key=lambda one: one.fit(record))
    fit = chosen.fit(record)
    if fit is Fit.NONE or (fit is Fit.QUESTION and columns and not questions_suffice):
        return None
    asked = _turns_of("user", record, chosen.question, chosen.optional, location)
    turns = [*_history(record), *asked]
    if fit is Fit.QUESTION or (fit is Fit.BLANK_ANSWER and questions_suffice):
        return turns
    answered = _turns_of("assistant", record, chosen.answer, frozenset(), location)
    return [*turns, *answered]


def _turns_of(
    role: Role, record: Fields, names: Sequence[str], optional: frozenset[str], location: str
) -> list[object]:
    """Return the turns in these columns: their texts joined, or the turns that one of them holds.

    Text before a single turn, or before the parts of a content, is the beginning of it. Raises
    `RejectedRecord` for other mixtures.
    """
    values = (_value(record.take(name), role, is_passage=name in optional) for name in names)
    present = [value for value in values if value not in (None, "")]
    texts = [value for value in present if isinstance(value, str)]
    if len(texts) == len(present):
        return [{"role": role, "content": "\n".join(texts)}]
    value = present[-1]
    if len(present) == 1:
        return list(value) if is_turn_list(value) else [{"role": role, "content": value}]
    led = _led_by("\n".join(texts), value, role) if len(texts) == len(present) - 1 else None
    if led is None or isinstance(value, str):
        detail = f"{', '.join(names)} are text and other values, which cannot be joined"
        raise RejectedRecord(Reason.NOT_TEXT, location, detail)
    return [led]


def _value(value: object, role: Role, *, is_passage: bool) -> object:
    """Return a text, turns or other content of a column; None if it holds nothing.

    Numbers are their text, turns may be JSON text, and the texts of a passage are joined.
    """
    if isinstance(value, float) and math.isnan(value):  # a missing cell in pandas
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        turns = parsed(value)
        return turns if _begins_as(role, turns) else value
    if not holds_something(value):
        return None
    if is_passage and is_list(value) and all(isinstance(text, str) for text in value):
        return "\n".join(map(str, value))
    return value


def _begins_as(role: Role, turns: object) -> bool:
    """Return whether these are turns of a question, or of an answer: other JSON is a text."""
    if not is_turn_list(turns):
        return False
    (first, *_) = turns
    by = speaker_of(first)
    return by == role or (role == "user" and by == "system")


def speaker_of(turn: object) -> Role | None:
    """Return the role of a turn; None for what is no turn, or of a role that is not known."""
    if not isinstance(turn, Mapping):
        return None
    name = next((turn[key] for key in ROLE_KEYS if turn.get(key)), None)
    by = speaker(name, {}) if isinstance(name, str) else None
    return by.role if by else None


def _led_by(text: str, value: object, role: Role) -> object:
    """Return a turn with the text before its content; None if the value is not one turn."""
    if not is_list(value):
        return None
    if not is_turn_list(value):
        parts = all(isinstance(part, Mapping) for part in value)
        return {"role": role, "content": _after(text, value)} if parts else None
    turn = value[0]
    if len(value) > 1 or not isinstance(turn, Mapping) or speaker_of(turn) != role:
        return None
    name = next((name for name in ("content", "value") if turn.get(name)), None)
    content = turn[name] if name else None
    if name is None or not (isinstance(content, str) or is_list(content)):
        return None
    return {**turn, name: _after(text, content)}


def _after(text: str, content: str | Sequence[object]) -> object:
    if isinstance(content, str):
        return f"{text}\n{content}"
    return [{"type": "text", "text": f"{text}\n"}, *content]


def is_turn_list(value: object) -> TypeGuard[Sequence[object]]:
    """Return whether a value is a list of turns, and not of a content's parts."""
    return (
        is_list(value)
        and bool(value)
        and all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value)
    )


def _history(record: Fields) -> list[object]:
    """Return the earlier turns in `history`: pairs of question and answer, or turns."""
    value = parsed(record.see("history"))
    if not is_list(value):
        return []
    pairs = [pair for pair in value if is_list(pair) and len(pair) == _PAIR]
    if not is_turn_list(value) and len(pairs) < len(value):
        return []
    record.ignore("history")
    if is_turn_list(value):
        return list(value)
    texts = [text for pair in pairs for text in pair]
    return [
        {"role": "assistant" if index % _PAIR else "user", "content": text}
        for index, text in enumerate(texts)
    ]


def without_pairs(turns: Sequence[object], notes: Notes, *, location: str) -> list[object]:
    """Return turns where pairs of question and answer (`input`, `output`) may be among them."""
    found: list[object] = []
    for turn in turns:
        pair = Fields(turn, within="turn.", notes=notes) if isinstance(turn, Mapping) else None
        if pair is None or any(map(pair.exists, ROLE_KEYS)) or not is_asked(pair):
            found.append(turn)
            continue
        found += as_turns(pair, None, location=location) or []
        pair.finish()
    return found
