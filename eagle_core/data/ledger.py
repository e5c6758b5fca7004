"""The cleaning ledger: why a record was dropped or changed, and its location in the source.

Invariant: every record read is either kept or entered as dropped, so counts add up to the input. A
changed record is kept and entered once per change. What concerns whole columns (fields that are not
read, null members of a table) has one entry per name, with the number of records and the first of
them.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from eagle_core.errors import EagleCoreError


class Reason(StrEnum):
    """Why a record was dropped."""

    BROKEN_JSON = "broken_json"
    BROKEN_UTF8 = "broken_utf8"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    NOT_AN_OBJECT = "not_an_object"
    NO_MESSAGES = "no_messages"
    UNKNOWN_ROLE = "unknown_role"
    NOT_TEXT = "not_text"
    BAD_TOOLS = "bad_tools"
    EMPTY_TURN = "empty_turn"
    WRONG_ALTERNATION = "wrong_alternation"
    NO_ASSISTANT_TURN = "no_assistant_turn"
    UNSUPPORTED_WEIGHT = "unsupported_weight"
    DUPLICATE = "duplicate"
    NOT_SELECTED = "not_selected"
    """The weight of its source leaves it out."""
    TEMPLATE_REFUSED = "template_refused"
    SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"  # noqa: S105 - a reason, not a secret
    TOO_FEW_SUPERVISED_TOKENS = "too_few_supervised_tokens"
    TEXT_NOT_OF_TEMPLATE = "text_not_of_template"
    BAD_TOKENS = "bad_tokens"
    """Token ids without a mask, or with one that does not fit them."""
    CALLS_NOT_RENDERED = "calls_not_rendered"
    """The chat template does not write tool calls: the answer would be empty."""
    SERVER_ERROR = "server_error"
    REQUEST_REFUSED = "request_refused"
    EMPTY_ANSWER = "empty_answer"
    ANSWER_CUT = "answer_cut"
    ANSWER_NOT_ENDED = "answer_not_ended"
    """The server stopped before the target did, such as `abort` or `content_filter`."""
    ANSWER_PAST_END = "answer_past_end"
    """The server's text goes on after the end of the turn."""
    CONTEXT_TOO_LONG = "context_too_long"
    TOOLS_NEED_SERVER = "tools_need_server"
    UNREADABLE = "unreadable"
    """This and those below are of hidden states that another tool dumped."""
    FORBIDDEN_PICKLE = "forbidden_pickle"
    """A pickle that would run code, or hold objects that are no tensors; nothing of it ran."""
    WRONG_KEYS = "wrong_keys"
    WRONG_SHAPE = "wrong_shape"
    UNKNOWN_TOKEN = "unknown_token"  # noqa: S105 - a reason, not a secret
    PADDED_ON_THE_LEFT = "padded_on_the_left"
    NO_MASK = "no_mask"
    BAD_STATES = "bad_states"
    """NaN, infinite, zero or constant."""
    NOT_REPRODUCED = "not_reproduced"
    """The target has other states for these tokens."""
    CONTAINED = "contained"
    """Another row begins with the same tokens."""


class Change(StrEnum):
    """What was changed in a record that was kept."""

    LEADING_ASSISTANT_TURNS_CUT = "leading_assistant_turns_cut"
    TRAILING_TURNS_CUT = "trailing_turns_cut"
    TURNS_JOINED = "turns_joined"
    NULL_MEMBERS_DROPPED = "null_members_dropped"
    """Of tools or of a call's arguments; a table fills absent members with null."""
    ENDED_AT_TOOL_CALL = "ended_at_tool_call"
    """The turns after a tool call refer to the original call, not to the target's."""
    ENDED_BEFORE_FAILED_ANSWER = "ended_before_failed_answer"
    """The detail names the turn and the `Reason`."""
    ENDED_BEFORE_UNANSWERED = "ended_before_unanswered"
    """The same, but the next run asks that turn again."""
    SYSTEM_NOT_RENDERED = "system_not_rendered"
    REASONING_NOT_RENDERED = "reasoning_not_rendered"
    TOOLS_NOT_RENDERED = "tools_not_rendered"
    """These three: the chat template does not write what the record holds."""
    PADDING_CUT = "padding_cut"
    CUT_TO_MAX_LENGTH = "cut_to_max_length"


class RejectedRecord(EagleCoreError):  # noqa: N818 - the outcome of one record, not a fault
    """One record cannot be used; the others can. Survives pickling with its reason and location."""

    def __init__(self, reason: Reason, location: str, detail: str = "") -> None:
        super().__init__(reason, location, detail)
        self.reason = reason
        self.location = location
        self.detail = detail

    def __str__(self) -> str:
        """Return location, reason and detail in one line."""
        return f"{self.location}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One row of the ledger."""

    location: str
    """File and position in it, or data set and row."""
    conversation_id: str
    """Empty where the record was too damaged to have one."""
    action: str
    """`dropped`, `changed` or `unread`."""
    reason: str
    """A `Reason` or a `Change`; for `unread`, the name of the field."""
    detail: str

    @classmethod
    def of(cls, rejected: RejectedRecord, *, conversation_id: str = "") -> Self:
        """Return the row that records why a record was dropped."""
        return cls(
            location=rejected.location,
            conversation_id=conversation_id,
            action="dropped",
            reason=rejected.reason.value,
            detail=rejected.detail,
        )

    @classmethod
    def of_change(
        cls, change: Change, *, location: str, conversation_id: str, detail: str = ""
    ) -> Self:
        """Return the row of a record that was kept with a change."""
        return cls(
            location=location,
            conversation_id=conversation_id,
            action="changed",
            reason=change.value,
            detail=detail,
        )
