"""Find the assistant's text, and renderings in which it follows the same context as in serving.

In serving, turn k follows its context: messages[:k] with the generation prompt. A row is the
rendering of a conversation up to one assistant turn. It supervises every turn whose context and
text it begins with. A template that only appends therefore needs one row per conversation. One that
rewrites history (for example, drops the reasoning of earlier turns) needs another row only for the
turns that the longer rendering changed. All decisions compare whole strings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eagle_core.data.conversation import Conversation
from eagle_core.tokenization.chat_template import ChatTemplate, Rendering, TemplateRefusedError


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistantTurn:
    """One assistant turn in the rendering that ends with it."""

    text: str
    """The conversation up to and including this turn."""
    start: int
    """First character that the model generates: `text[:start]` is the serving context."""
    content_end: int
    """Where the end-of-turn marker begins."""
    end: int
    """Where the end-of-turn marker ends; what follows (a line break) belongs to the template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One text to tokenise and the characters in it that are supervised."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Ascending (start, end); the text before a start is the serving context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Closing:
    """Text that the template writes after the last assistant turn's content."""

    text: str
    """Marker and the text after it."""
    marker_end: int
    """Length of the marker in `text`."""


def find_turns(
    template: ChatTemplate,
    conversation: Conversation,
    closing: Closing,
    *,
    enable_thinking: bool | None,
) -> list[AssistantTurn]:
    """Return the assistant's turns; raise `TemplateRefusedError` if one cannot be located.

    Without `enable_thinking`, serving is assumed to request reasoning if the answer has some.
    """
    messages = [message.as_openai() for message in conversation.messages]
    tools = json.loads(conversation.tools) if conversation.tools else None
    turns = []
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        inputs = _TurnInputs(
            template=template,
            before=messages[:index],
            answer=messages[index],
            reasoning=message.reasoning,
            tools=tools,
            thinking=bool(message.reasoning) if enable_thinking is None else enable_thinking,
        )
        turns.append(_marked_turn(inputs) if template.marks_generation else _turn(inputs, closing))
    return turns


def common_end(one: str, two: str) -> str:
    """Return the longest common suffix."""
    length = 0
    while length < min(len(one), len(two)) and one[-1 - length] == two[-1 - length]:
        length += 1
    return one[len(one) - length :]


def plan_rows(turns: Sequence[AssistantTurn], *, last_turn_only: bool) -> list[Row]:
    """Return the fewest renderings that contain every turn in its context, shortest first."""
    remaining = list(turns[-1:] if last_turn_only else turns)
    rows: list[Row] = []
    while remaining:
        text = remaining[-1].text
        spans = [(turn, _end_in(turn, text)) for turn in remaining]
        rows.append(
            Row(text=text, spans=tuple((turn.start, end) for turn, end in spans if end is not None))
        )
        remaining = [turn for turn, end in spans if end is None]
    return rows[::-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _TurnInputs:
    """An answer and the inputs of the template for it."""

    template: ChatTemplate
    before: Sequence[Mapping[str, object]]
    answer: Mapping[str, object]
    reasoning: str
    tools: Sequence[object] | None
    thinking: bool

    def context(self) -> str:
        """Return the serving context."""
        return self.template.render(
            self.before, tools=self.tools, thinking=self.thinking, add_generation_prompt=True
        ).text

    def whole(self) -> Rendering:
        """Return the rendering that ends with the answer."""
        return self.template.render(
            [*self.before, self.answer],
            tools=self.tools,
            thinking=self.thinking,
            add_generation_prompt=False,
        )


def _turn(inputs: _TurnInputs, closing: Closing) -> AssistantTurn:
    context = inputs.context()
    text = inputs.whole().text
    if not text.startswith(context):
        text = _with_reasoning(context, text, inputs.reasoning)
    if text.endswith(closing.text) and len(text) - len(closing.text) >= len(context):
        content_end = len(text) - len(closing.text)
        end = content_end + closing.marker_end
    else:  # a tool call may close with another marker
        content_end = end = len(text.rstrip())
    return AssistantTurn(text=text, start=len(context), content_end=content_end, end=end)


def _marked_turn(inputs: _TurnInputs) -> AssistantTurn:
    """Return the turn from the `{% generation %}` blocks after the generation prompt."""
    whole = inputs.whole()
    after = _common_length(whole.text, inputs.context())
    blocks = [block for block in whole.generated if block[0] >= after]
    if not blocks:
        raise TemplateRefusedError("no generation block for an assistant turn")
    start, end = blocks[0][0], blocks[-1][1]
    return AssistantTurn(text=whole.text, start=start, content_end=end, end=end)


def _with_reasoning(context: str, text: str, reasoning: str) -> str:
    """Return the rendering with its reasoning, for a generation prompt that opens reasoning.

    Templates such as DeepSeek-R1's never render reasoning, so `text` lacks it. The model generates
    reasoning, closing tag, answer.
    """
    header = context.removesuffix("\n").removesuffix("<think>")
    if not context.rstrip("\n").endswith("<think>") or not text.startswith(header):
        raise TemplateRefusedError(
            f"an answer does not begin with the generation prompt {context[-40:]!r}"
        )
    if not reasoning:
        raise TemplateRefusedError("the generation prompt opens reasoning, but the answer has none")
    answer = text[len(header) :]
    if answer.startswith("</think>"):
        return f"{context}{reasoning}{answer}"
    return f"{context}{reasoning}\n</think>\n\n{answer}"


def _common_length(one: str, two: str) -> int:
    for length, (left, right) in enumerate(zip(one, two, strict=False)):
        if left != right:
            return length
    return min(len(one), len(two))


def _end_in(turn: AssistantTurn, text: str) -> int | None:
    """Return the end of the turn in `text`, or None if context or content differ there.

    If only the end-of-turn marker differs (harmony closes the last turn with another token than
    earlier ones), the span excludes the marker.
    """
    for end in (turn.end, turn.content_end):
        if text.startswith(turn.text[:end]):
            return end
    return None
