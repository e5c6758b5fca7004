"""Which text is the assistant's, and in which rendering it stands as it would when serving.

When serving, turn k is written after its context: messages[:k] with the generation prompt. A row
is the rendering of a conversation up to one assistant turn. It teaches every turn whose context and
text it begins with, so a template that only appends needs one row a conversation; one that rewrites
history (drops the reasoning of earlier turns, say) needs a further row only for the turns that the
longer rendering changed. Everything here is a comparison of whole strings.
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
    """The conversation up to and with this turn."""
    start: int
    """First character that the model writes: `text[:start]` is the context when serving."""
    content_end: int
    """Where the end-of-turn marker begins."""
    end: int
    """Where the end-of-turn marker ends; what follows (a line break) is the template's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One text to tokenise and the characters in it that are supervised."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Ascending (start, end); everything before a start is what serving has in context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Closing:
    """What the template writes after the last assistant turn's content."""

    text: str
    """Marker and whatever follows it."""
    marker_end: int
    """Length of the marker in `text`."""


def find_turns(
    template: ChatTemplate,
    conversation: Conversation,
    closing: Closing,
    *,
    enable_thinking: bool | None,
) -> list[AssistantTurn]:
    """Return the assistant's turns; raise `TemplateRefusedError` if one has no clear place.

    Without `enable_thinking`, serving is taken to ask for reasoning where the answer has some.
    """
    messages = [message.as_openai() for message in conversation.messages]
    tools = json.loads(conversation.tools) if conversation.tools else None
    turns = []
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        scene = _Scene(
            template=template,
            before=messages[:index],
            answer=messages[index],
            reasoning=message.reasoning,
            tools=tools,
            thinking=bool(message.reasoning) if enable_thinking is None else enable_thinking,
        )
        turns.append(_marked_turn(scene) if template.marks_generation else _turn(scene, closing))
    return turns


def common_end(one: str, two: str) -> str:
    """Return the longest text that both end with."""
    length = 0
    while length < min(len(one), len(two)) and one[-1 - length] == two[-1 - length]:
        length += 1
    return one[len(one) - length :]


def plan_rows(turns: Sequence[AssistantTurn], *, last_turn_only: bool) -> list[Row]:
    """Return the fewest renderings that show every turn in its context, shortest first."""
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
class _Scene:
    """An answer and all that the template sees when it is due."""

    template: ChatTemplate
    before: Sequence[Mapping[str, object]]
    answer: Mapping[str, object]
    reasoning: str
    tools: Sequence[object] | None
    thinking: bool

    def context(self) -> str:
        """Return what serving has in context."""
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


def _turn(scene: _Scene, closing: Closing) -> AssistantTurn:
    context = scene.context()
    text = scene.whole().text
    if not text.startswith(context):
        text = _with_reasoning(context, text, scene.reasoning)
    if text.endswith(closing.text) and len(text) - len(closing.text) >= len(context):
        content_end = len(text) - len(closing.text)
        end = content_end + closing.marker_end
    else:  # a call of a tool may close with another marker
        content_end = end = len(text.rstrip())
    return AssistantTurn(text=text, start=len(context), content_end=content_end, end=end)


def _marked_turn(scene: _Scene) -> AssistantTurn:
    """Return the turn from the `{% generation %}` blocks behind the generation prompt."""
    whole = scene.whole()
    after = _common_length(whole.text, scene.context())
    blocks = [block for block in whole.generated if block[0] >= after]
    if not blocks:
        raise TemplateRefusedError("no generation block for an assistant turn")
    start, end = blocks[0][0], blocks[-1][1]
    return AssistantTurn(text=whole.text, start=start, content_end=end, end=end)


def _with_reasoning(context: str, text: str, reasoning: str) -> str:
    """Return the answer as written after a prompt that opens reasoning, with it.

    DeepSeek-R1 and its kin never render reasoning, so `text` lacks it. The model's own form is
    reasoning, closing tag, answer.
    """
    header = context.removesuffix("\n").removesuffix("<think>")
    if not context.rstrip("\n").endswith("<think>") or not text.startswith(header):
        raise TemplateRefusedError(
            f"an answer does not begin with the generation prompt {context[-40:]!r}"
        )
    if not reasoning:
        raise TemplateRefusedError("the generation prompt opens reasoning, the answer has none")
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
    """Return up to where `text` is the same as the turn's own rendering, or None if too little is.

    Where only the end-of-turn marker differs (harmony closes the last turn with another token than
    earlier ones), the content is the same and the marker is left out of the span.
    """
    for end in (turn.end, turn.content_end):
        if text.startswith(turn.text[:end]):
            return end
    return None
