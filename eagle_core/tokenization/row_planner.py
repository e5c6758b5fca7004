"""Plan the rows of a conversation: the texts to encode, and what is supervised in them.

Everything that is decided before a text becomes token ids is decided here: how a rendered text is
read back, which conversations a template cannot take, and what it does not write of the others.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Change, LedgerEntry, Reason, RejectedRecord
from eagle_core.tokenization.assistant_turns import AssistantTurn, Row, find_turns, plan_rows
from eagle_core.tokenization.chat_format import ChatFormats
from eagle_core.tokenization.chat_template import TemplateRefusedError
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.rendered_text import NotOfTemplateError, RenderedTextReader
from eagle_core.tokenization.unrendered import find_unrendered, refuse_unwritten_calls


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRows:
    """The rows of one conversation, before they are tokenised."""

    conversation: Conversation
    rows: list[Row]
    unrendered: tuple[Change, ...]
    """What the template does not write of it."""

    def entries(self) -> Iterator[LedgerEntry]:
        """Yield what the ledger says of it."""
        for change in self.unrendered:
            yield LedgerEntry.of_change(
                change,
                location=self.conversation.location or self.conversation.conversation_id,
                conversation_id=self.conversation.conversation_id,
            )


class RowPlanner:
    """Plans rows with one target's templates."""

    def __init__(
        self,
        formats: ChatFormats,
        config: TemplateConfig,
        *,
        control: Collection[str],
        stops: Collection[str],
        begin: str,
    ) -> None:
        """Learn how the template's texts are read back.

        Args:
            formats: the templates, with what ends an answer in each.
            config: how conversations are rendered.
            control: tokens that no message may contain, because the template writes them.
            stops: tokens on which a server stops.
            begin: the first token, which a rendered text may lack.

        """
        self._formats = formats
        self._config = config
        self._control = _any_of(control)
        self._stops = _any_of(stops)
        self._reader = RenderedTextReader(formats.plain.template, control=control, begin=begin)

    def refuse_control_tokens(self, messages: Sequence[Message], *, location: str) -> None:
        """Raise RejectedRecord if a message contains the text of a control token."""
        for index, message in enumerate(messages):
            for text in (message.content, message.reasoning_content):
                if found := self._control.search(text):
                    raise RejectedRecord(
                        Reason.SPECIAL_TOKEN_IN_TEXT, location, f"turn {index} contains {found[0]}"
                    )

    def plan(self, conversation: Conversation) -> PlannedRows:
        """Return the rows of turns or of a rendered text.

        Raises:
            RejectedRecord: located by conversation id; the template refuses the turns or does not
                write a call, a message contains the text of a control token, or nothing is
                supervised.

        """
        if conversation.rendered_text:
            conversation = self._read_back(conversation)
        self.refuse_control_tokens(conversation.messages, location=conversation.conversation_id)
        if self._config.reasoning == "drop":
            answers = tuple(message.without_reasoning() for message in conversation.messages)
            conversation = replace(conversation, messages=answers)
        turns, unrendered = self._turns(conversation)
        if not turns:
            detail = "its record excludes every answer from the loss"
            reason = Reason.TOO_FEW_SUPERVISED_TOKENS
            raise RejectedRecord(reason, conversation.conversation_id, detail)
        return PlannedRows(
            conversation=conversation,
            rows=plan_rows(turns, last_turn_only=self._config.last_turn_only),
            unrendered=unrendered,
        )

    def _turns(
        self, conversation: Conversation
    ) -> tuple[Sequence[AssistantTurn], tuple[Change, ...]]:
        """Return the supervised turns, and what the template does not write."""
        used = self._formats.for_tools(conversation.tools)
        thinking = self._thinks(conversation)
        refuse_unwritten_calls(used.template, conversation, thinking=thinking)
        try:
            turns = find_turns(
                used.template, conversation, used.end, enable_thinking=self._config.enable_thinking
            )
            self._refuse_inner_stops(turns)
        except TemplateRefusedError as error:
            raise RejectedRecord(
                Reason.TEMPLATE_REFUSED, conversation.conversation_id, str(error)
            ) from error
        return turns, find_unrendered(used.template, conversation, turns, thinking=thinking)

    def _thinks(self, conversation: Conversation) -> bool:
        """Return whether serving would request reasoning for an answer of this conversation."""
        if self._config.enable_thinking is not None:
            return self._config.enable_thinking
        return any(message.reasoning for message in conversation.messages)

    def _refuse_inner_stops(self, turns: Sequence[AssistantTurn]) -> None:
        for turn in turns:
            found = self._stops.search(turn.text, turn.start, turn.content_end)
            if found and found.end() < turn.content_end:
                raise TemplateRefusedError(
                    f"{found[0]}, on which a server stops, is inside an answer"
                )

    def _read_back(self, conversation: Conversation) -> Conversation:
        try:
            messages = self._reader.read(conversation.rendered_text)
        except NotOfTemplateError as error:
            raise RejectedRecord(
                Reason.TEXT_NOT_OF_TEMPLATE, conversation.conversation_id, str(error)
            ) from error
        return replace(conversation, messages=messages, rendered_text="")


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts))) or "(?!)")
