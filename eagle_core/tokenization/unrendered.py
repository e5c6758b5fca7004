"""What a conversation holds and its chat template does not write.

Decided by rendering with and without: no difference means that the model never sees it. A call that
is not written leaves an empty answer and a result out of nowhere, so such a conversation is
refused. A system turn, reasoning or a list of tools that is not written is not written in serving
either; the conversation is kept, and the ledger says so.
"""

import json
from collections.abc import Mapping, Sequence

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.tokenization.assistant_turns import AssistantTurn
from eagle_core.tokenization.chat_template import ChatTemplate, TemplateRefusedError

_OTHER = {"function": {"name": "another_name", "arguments": {"another": "one"}}}


def refuse_unwritten_calls(
    template: ChatTemplate, conversation: Conversation, *, thinking: bool
) -> None:
    """Raise RejectedRecord if the template does not write one of the tool calls.

    Asked before the turns are found: a template without calls may refuse their results, too.
    """
    if not any(one.tool_calls for one in conversation.messages):
        return
    if not _View(template, conversation, thinking=thinking).writes_calls():
        raise RejectedRecord(
            Reason.CALLS_NOT_RENDERED,
            conversation.conversation_id,
            "the chat template does not write its tool calls; set `chat_template` to one that does",
        )


def find_unrendered(
    template: ChatTemplate,
    conversation: Conversation,
    turns: Sequence[AssistantTurn],
    *,
    thinking: bool,
) -> tuple[Change, ...]:
    """Return what the template does not write of a conversation whose supervised turns are given.

    `thinking` says whether serving would request reasoning.
    """
    view = _View(template, conversation, thinking=thinking)
    found = []
    if conversation.messages[0].role == "system" and not view.writes_system():
        found.append(Change.SYSTEM_NOT_RENDERED)
    if not view.writes_reasoning(turns):
        found.append(Change.REASONING_NOT_RENDERED)
    if conversation.tools and not view.writes_tools():
        found.append(Change.TOOLS_NOT_RENDERED)
    return tuple(found)


class _View:
    """Renderings of one conversation, whole and with something left out."""

    def __init__(
        self, template: ChatTemplate, conversation: Conversation, *, thinking: bool
    ) -> None:
        self._template = template
        self._thinking = thinking
        self._messages = conversation.messages
        self._openai = [message.as_openai() for message in conversation.messages]
        self._tools = json.loads(conversation.tools) if conversation.tools else None

    def writes_calls(self) -> bool:
        """Compare with another call in the place of each, one at a time.

        Where the whole is refused, only the turns up to the call are compared.
        """
        return all(
            self._writes_call(turn, number)
            for turn, message in enumerate(self._messages)
            for number in range(len(message.tool_calls))
        )

    def _writes_call(self, turn: int, number: int) -> bool:
        other = self._with_other_call(turn, number)
        for upto in (len(other), turn + 1):
            written = self._render(self._openai[:upto], self._tools)
            if written is not None:
                return written != self._render(other[:upto], self._tools)
        return True  # it refuses these turns, and says why

    def _with_other_call(self, turn: int, number: int) -> list[Mapping[str, object]]:
        calls = [call.as_openai() for call in self._messages[turn].tool_calls]
        calls[number] = {**calls[number], **_OTHER}
        changed = {**self._openai[turn], "tool_calls": calls}
        return [*self._openai[:turn], changed, *self._openai[turn + 1 :]]

    def writes_system(self) -> bool:
        """Compare without the system turn, unless its text is in the rendering and nowhere else."""
        first = self._messages[0].content
        is_unique = not any(first in message.content for message in self._messages[1:])
        if is_unique and first in (self._render(self._openai, self._tools) or ""):
            return True
        return self._differs(self._openai[1:], self._tools)

    def writes_tools(self) -> bool:
        """Compare without the list of tools."""
        return self._differs(self._openai, None)

    def writes_reasoning(self, turns: Sequence[AssistantTurn]) -> bool:
        """Return whether every supervised turn with reasoning has it in its own rendering."""
        answers = [one for one in self._messages if one.role == "assistant" and one.is_supervised]
        return all(
            _has_reasoning(turn, message) for turn, message in zip(turns, answers, strict=True)
        )

    def _differs(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None
    ) -> bool:
        """Return whether the rendering is another; one that is refused is."""
        whole = self._render(self._openai, self._tools)
        return whole is None or whole != self._render(messages, tools)

    def _render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None
    ) -> str | None:
        try:
            return self._template.render(
                messages, tools=tools, thinking=self._thinking, add_generation_prompt=False
            ).text
        except TemplateRefusedError:
            return None


def _has_reasoning(turn: AssistantTurn, message: Message) -> bool:
    return message.reasoning_content.strip() in turn.text
