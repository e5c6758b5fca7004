"""Records with question and answer in columns (Alpaca, Dolly, GSM8K, TRL, ...), as turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeGuard

from eagle_core.data.records.fields import Fields, is_list, parsed

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
)
"""The first of those that fit best is taken."""


def as_turns(
    record: Fields, columns: Columns | None, *, questions_suffice: bool = False
) -> list[object] | None:
    """Return the turns of question and answer, after those of `history`; None without columns.

    Without `columns`, the usual names are tried. A question whose answer has no column is its only
    turn, and with `questions_suffice` also one whose answer is empty. Question and answer may be
    lists of turns themselves, as in TRL. Other values than text are passed on: `normalise` refuses
    them.
    """
    candidates = KNOWN_COLUMNS if columns is None else (columns,)
    # A table of several forms has the columns of all of them, filled with null.
    chosen = max(candidates, key=lambda one: one.fit(record))
    fit = chosen.fit(record)
    if fit is Fit.NONE or (fit is Fit.QUESTION and columns and not questions_suffice):
        return None
    turns = [*_history(record), *_turns_of("user", record, chosen.question)]
    if fit is Fit.QUESTION or (fit is Fit.BLANK_ANSWER and questions_suffice):
        return turns
    return [*turns, *_turns_of("assistant", record, chosen.answer)]


def _turns_of(role: str, record: Fields, names: Sequence[str]) -> list[object]:
    value = _joined(record, names)
    return list(value) if is_turn_list(value) else [{"role": role, "content": value}]


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


def _joined(record: Fields, names: Sequence[str]) -> object:
    values = [record.take(name) for name in names]
    present = [value for value in values if value not in (None, "")]
    if all(isinstance(value, str) for value in present):
        return "\n".join(map(str, present))
    return next(value for value in present if not isinstance(value, str))
