"""Records with one question and one answer in columns (Alpaca, GSM8K, ...), as two turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Columns of the question and of the answer; several are joined by line breaks."""

    question: tuple[str, ...]
    answer: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    """Columns that may be missing or empty."""

    def are_in(self, record: Mapping[str, object]) -> bool:
        """Return whether the record has all required columns."""
        return all(
            name in record or name in self.optional for name in (*self.question, *self.answer)
        )


KNOWN_COLUMNS: Sequence[Columns] = (
    Columns(
        question=("instruction", "input"), answer=("output",), optional=frozenset({"input"})
    ),  # Alpaca, CodeAlpaca, opc-sft-stage1
    Columns(question=("instruction",), answer=("response",)),  # Magicoder, Dolly
    Columns(question=("prompt",), answer=("response",)),
    Columns(question=("prompt",), answer=("completion",)),
    Columns(question=("query",), answer=("response",)),  # MetaMath
    Columns(question=("question",), answer=("answer",)),  # GSM8K
    Columns(question=("problem",), answer=("solution",)),  # MATH
    Columns(question=("input",), answer=("output",)),  # OpenCodeInstruct
    Columns(question=("message_1",), answer=("message_2",)),  # CAMEL
)
"""Tried in this order."""


def as_turns(
    record: Mapping[str, object], columns: Columns | None
) -> list[dict[str, object]] | None:
    """Return the two turns (after those of a `system` column), or None if columns are missing.

    Without `columns`, the usual names are tried. Other values than text are passed on: `normalise`
    refuses them.
    """
    candidates = KNOWN_COLUMNS if columns is None else (columns,)
    found = next((one for one in candidates if one.are_in(record)), None)
    if found is None:
        return None
    turns: list[dict[str, object]] = []
    system = record.get("system", record.get("system_prompt"))
    if isinstance(system, str) and system.strip():
        turns.append({"role": "system", "content": system})
    turns.append({"role": "user", "content": _joined(record, found.question)})
    turns.append({"role": "assistant", "content": _joined(record, found.answer)})
    return turns


def _joined(record: Mapping[str, object], names: Sequence[str]) -> object:
    values = [record.get(name) for name in names]
    present = [value for value in values if value not in (None, "")]
    if all(isinstance(value, str) for value in present):
        return "\n".join(map(str, present))
    return next(value for value in present if not isinstance(value, str))
