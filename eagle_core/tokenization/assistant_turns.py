"""Find the assistant's text, and renderings in which it follows the same context as in serving.

In serving, turn k follows its context: messages[:k] with the generation prompt. A row is the
rendering of a conversation up to one assistant turn. It supervises every turn whose context and
text it begins with. A template that only appends therefore needs one row per conversation. One that
rewrites history (for example, drops the reasoning of earlier turns) needs another row only for the
turns that the longer rendering changed. All decisions compare whole strings.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eagle_core.data.conversation import Conversation
from eagle_core.tokenization.answer_end import AnswerEnd
from eagle_core.tokenization.chat_template import ChatTemplate, Rendering, TemplateRefusedError

_MARKERS = re.compile(r"(?:\s|<[^<>]*>|\[[A-Z_/]+\])*")
"""Text of nothing but markers: a generation prompt that a template writes behind every turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistantTurn:
    """One assistant turn in the rendering that ends with it."""

    text: str
    """The conversation up to and including this turn."""
    start: int
    """First character that the model generates: `text[:start]` is the serving context."""
    content_end: int
    """Where the content ends."""
    end: int
    """Where the token that ends the answer ends (see `answer_end`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One text to tokenise and the characters in it that are supervised."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Ascending (start, end); the text before a start is the serving context."""


def find_turns(
    template: ChatTemplate,
    conversation: Conversation,
    end: AnswerEnd,
    *,
    enable_thinking: bool | None,
) -> list[AssistantTurn]:
    """Return the supervised turns; raise `TemplateRefusedError` if one cannot be located.

    Without `enable_thinking`, serving is assumed to request reasoning if the answer has some.
    """
    messages = [message.as_openai() for message in conversation.messages]
    tools = json.loads(conversation.tools) if conversation.tools else None
    turns = []
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant" or not message.is_supervised:
            continue
        inputs = _TurnInputs(
            template=template,
            before=messages[:index],
            answer=messages[index],
            reasoning=message.reasoning,
            tools=tools,
            thinking=bool(message.reasoning) if enable_thinking is None else enable_thinking,
        )
        turns.append(_turn(inputs, end))
    return turns


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


def _turn(inputs: _TurnInputs, end: AnswerEnd) -> AssistantTurn:
    whole = inputs.whole()
    context = inputs.context()
    text = whole.text
    if not text.startswith(context):
        if inputs.template.marks_generation:
            return _marked(whole, _common_length(text, context), _ended(whole.text, 0, inputs, end))
        text = _with_reasoning(context, text, inputs.reasoning)
    turn = _ended(text, len(context), inputs, end)
    return _marked(whole, len(context), turn) if inputs.template.marks_generation else turn


def _ended(text: str, start: int, inputs: _TurnInputs, end: AnswerEnd) -> AssistantTurn:
    """Return the turn of `text` from `start` on, with the token that ends it."""
    is_call = bool(inputs.answer.get("tool_calls"))
    content_end = len(text) - len(end.closing)
    is_closed = text.endswith(end.closing) and content_end >= start
    ending = end.call_ending if is_call and end.call_ending else end.ending
    if is_closed and end.closing.startswith(ending):
        return AssistantTurn(
            text=text, start=start, content_end=content_end, end=content_end + len(ending)
        )
    if is_closed and not end.closing.strip():  # the next role's marker ends it
        text = text[:content_end] + ending
        return AssistantTurn(text=text, start=start, content_end=content_end, end=len(text))
    # another marker closes it, as a tool call's may
    stripped = _upto_end_token(text.rstrip(), start, end.tokens)
    return AssistantTurn(text=text, start=start, content_end=stripped, end=stripped)


def _upto_end_token(text: str, start: int, tokens: Sequence[str]) -> int:
    """Return where the last of these tokens ends, if only markers are behind it (Command R7B)."""
    ends = [text.rfind(token, start) + len(token) for token in tokens if token in text[start:]]
    last = max(ends, default=-1)
    return last if last >= 0 and _MARKERS.fullmatch(text, last) else len(text)


def _marked(whole: Rendering, after: int, turn: AssistantTurn) -> AssistantTurn:
    """Return the part of the turn in the `{% generation %}` blocks behind the generation prompt.

    Blocks that reach to the end of the content supervise the token that ends the answer, too,
    wherever the template closes them.
    """
    blocks = [block for block in whole.generated if block[1] > after]
    if not blocks:
        raise TemplateRefusedError("no generation block for an assistant turn")
    start, block_end = max(blocks[0][0], after), blocks[-1][1]
    if block_end >= turn.content_end:
        return replace(turn, start=start)
    return replace(turn, start=start, content_end=block_end, end=block_end)


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
