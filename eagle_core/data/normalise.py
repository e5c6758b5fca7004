"""Normalise conversations of all supported record formats into one form.

A conversation is an optional system turn, then alternating user and assistant turns (tool results
may come between two assistant turns), and ends with the assistant, or with a question if questions
suffice. A record that does not fit this form raises `RejectedRecord`. Nothing is guessed, nothing
is silently repaired, and what holds something and is not read is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from eagle_core.data.columns import Columns, as_turns, is_asked, without_pairs
from eagle_core.data.conversation import Conversation, Message, Role, content_key
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.data.records.alternation import ordered
from eagle_core.data.records.calls import parse_tools
from eagle_core.data.records.fields import (
    Fields,
    Notes,
    encodable,
    holds_something,
    is_list,
    parsed,
)
from eagle_core.data.records.loss_weight import refuse_excluded
from eagle_core.data.records.token_row import has_token_ids, read_token_row
from eagle_core.data.records.turn import read_turn

_MESSAGE_KEYS = ("conversations", "conversation", "messages")
_ID_KEYS = ("id", "conversation_id", "prompt_id", "uuid")
_SYSTEM_KEYS = ("system", "system_prompt")
_NO_ROLES: Mapping[str, Role] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalised:
    """A conversation, the changes that were needed, and what was not read."""

    conversation: Conversation
    changes: tuple[Change, ...]
    unread: tuple[str, ...]
    """Names of fields that hold something and have no meaning here; those of turns begin with
    `turn.`."""


def normalise(
    record: object,
    *,
    location: str,
    columns: Columns | None = None,
    rendered_text: str | None = None,
    roles: Mapping[str, Role] = _NO_ROLES,
    join_turns: bool = False,
    questions_suffice: bool = False,
) -> Normalised:
    """Return the conversation in a ShareGPT, OpenAI, question-and-answer, token or rendered record.

    ShareGPT turns have `from` and `value`, OpenAI's `role` and `content`. `columns` names question
    and answer; without it, the usual names apply if there is no list of turns. `rendered_text`
    names the column of a text that a chat template rendered. `roles` names roles that are not
    known. `join_turns` joins consecutive turns of one role. With `questions_suffice` a
    conversation needs no answer, and a question at its end stays.

    Changes are reported in `changes`. Assistant turns before the first user turn are cut: the
    question that they answer is missing. Turns after the last assistant turn are cut: nothing in
    them is supervised. Raises `RejectedRecord` with a reason for everything else.
    """
    if not isinstance(record, Mapping):
        raise RejectedRecord(Reason.NOT_AN_OBJECT, location, f"found {type(record).__name__}")
    try:
        if rendered_text is not None:
            return _rendered(Fields(record, notes=Notes()), rendered_text, location)
        form = _Form(
            columns=columns, roles=roles, join_turns=join_turns, questions_suffice=questions_suffice
        )
        return _chat(Fields(record, notes=Notes()), form, location)
    except RecursionError as error:
        raise RejectedRecord(Reason.BROKEN_JSON, location, "nested too deeply") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """How turns are found and read."""

    columns: Columns | None
    roles: Mapping[str, Role]
    join_turns: bool
    questions_suffice: bool


def _chat(fields: Fields, form: _Form, location: str) -> Normalised:
    """Return the conversation in a record of turns, of question and answer, or of token ids."""
    refuse_excluded(fields, location)
    if has_token_ids(fields) and not _is_text(fields, form):
        return _token_ids(fields, form, location)
    conversation_id = _record_id(fields, location)
    messages = [
        read_turn(turn, location=f"{location}, turn {index}", roles=form.roles, notes=fields.notes)
        for index, turn in enumerate(_turns(fields, form, location))
    ]
    messages = [one for one in messages if one.role != "system" or one.content.strip()]
    turns = ordered(
        [*_system_turn(fields, messages, location), *messages],
        location=location,
        join_turns=form.join_turns,
        questions_suffice=form.questions_suffice,
    )
    conversation = Conversation(
        conversation_id=conversation_id,
        messages=turns.messages,
        tools=parse_tools(fields, location=location),
        location=location,
    )
    return _normalised(conversation, turns.changes, fields)


def _is_text(fields: Fields, form: _Form) -> bool:
    """Return whether a record with token ids holds turns, or question and answer: they come first.

    A target is asked in text; a question without its answer is a column beside the ids otherwise.
    """
    if form.columns or is_asked(fields, questions_suffice=form.questions_suffice):
        return True
    return any(holds_something(parsed(fields.see(key))) for key in _MESSAGE_KEYS)


def _token_ids(fields: Fields, form: _Form, location: str) -> Normalised:
    if form.questions_suffice:
        detail = "token ids, not turns: a target cannot answer them again"
        raise RejectedRecord(Reason.NO_MESSAGES, location, detail)
    conversation = Conversation(
        conversation_id=_record_id(fields, location),
        messages=(),
        tokens=read_token_row(fields, location=location),
        location=location,
    )
    return _normalised(conversation, (), fields)


def _normalised(
    conversation: Conversation, changes: Sequence[Change], fields: Fields
) -> Normalised:
    fields.finish()
    if fields.notes.null_members:
        changes = (*changes, Change.NULL_MEMBERS_DROPPED)
    if not conversation.conversation_id:
        conversation = replace(conversation, conversation_id=content_key(conversation))
    return Normalised(
        conversation=conversation, changes=tuple(changes), unread=tuple(sorted(fields.notes.unread))
    )


def _record_id(record: Fields, location: str) -> str:
    """Return the id of the record; empty if it has none."""
    named = record.take(*(name for name in _ID_KEYS if record.see(name) != ""))
    record.ignore(*_ID_KEYS)
    return "" if named is None else encodable(str(named), location)


def _rendered(fields: Fields, column: str, location: str) -> Normalised:
    """Return the text in a column that a chat template rendered."""
    conversation = Conversation(
        conversation_id=_record_id(fields, location),
        messages=(),
        rendered_text=_rendered_text(fields, column, location),
        location=location,
    )
    return _normalised(conversation, (), fields)


def _rendered_text(record: Fields, column: str, location: str) -> str:
    text = record.take(column)
    if text is None:
        detail = f"no column {column}; found {record.names}"
        raise RejectedRecord(Reason.NO_MESSAGES, location, detail)
    if not isinstance(text, str):
        raise RejectedRecord(Reason.NOT_TEXT, location, f"{column} is {type(text).__name__}")
    if not text.strip():
        raise RejectedRecord(Reason.EMPTY_TURN, location, f"{column} is empty")
    return encodable(text, location)


def _turns(record: Fields, form: _Form, location: str) -> Sequence[object]:
    for key in () if form.columns else _MESSAGE_KEYS:
        turns = parsed(record.see(key))
        if is_list(turns):
            record.ignore(key)
            if holds_something(turns):
                return without_pairs(turns, record.notes, location=location)
    asked = as_turns(
        record, form.columns, location=location, questions_suffice=form.questions_suffice
    )
    if asked is None:
        raise RejectedRecord(Reason.NO_MESSAGES, location, _nothing_read(record, form.columns))
    return asked


def _nothing_read(record: Fields, columns: Columns | None) -> str:
    """Return why a record has no turns, and which key helps."""
    if columns:
        for key, names in (("question", columns.question), ("answer", columns.answer)):
            missing = [name for name in names if not record.exists(name)]
            if missing:
                named = ", ".join(missing)
                return f"no column {named} (`dataset.{key}`); found {record.names}"
    empty = next(filter(record.exists, _MESSAGE_KEYS), None)
    found = f"neither turns nor question; found {record.names}"
    if empty and is_list(parsed(record.see(empty))):
        found = f"{empty} is empty; found {record.names}"
    return f"{found}; name the columns with `dataset.question` and `dataset.answer`"


def _system_turn(record: Fields, messages: Sequence[Message], location: str) -> list[Message]:
    """Return the turn in a `system` column; turns that have one of their own keep it."""
    name = next((name for name in _SYSTEM_KEYS if record.holds(name)), None)
    text = record.see(name) if name else None
    if name is None or not isinstance(text, str):
        return []
    has_own = bool(messages) and messages[0].role == "system"
    if not has_own or messages[0].content.strip() == text.strip():
        record.ignore(name)
    return [] if has_own else [Message(role="system", content=encodable(text, location))]
