"""Which text is the assistant's, and in which rendering it stands as it would when serving.

When serving, turn k is written after its context: messages[:k] with the generation prompt. A row
is the rendering of a conversation up to one assistant turn. It teaches every turn whose context and
text it begins with, so a template that only appends needs one row a conversation; one that rewrites
history (drops the reasoning of earlier turns, say) needs a further row only for the turns that the
longer rendering changed. Everything here is a comparison of whole strings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eagle_core.chat_template import ChatTemplate, TemplateRefusedError


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
    template: ChatTemplate, messages: Sequence[Mapping[str, object]], closing: Closing
) -> list[AssistantTurn]:
    """Return the assistant's turns; raise `TemplateRefusedError` if one has no clear place."""
    return [
        _find_turn(template, messages[: index + 1], closing)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


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


def _find_turn(
    template: ChatTemplate, messages: Sequence[Mapping[str, object]], closing: Closing
) -> AssistantTurn:
    whole = template.render(messages, add_generation_prompt=False)
    text = whole.text
    if template.marks_generation:
        if not whole.generated:
            raise TemplateRefusedError("no generation block for an assistant turn")
        start, end = whole.generated[-1]
        return AssistantTurn(text=text, start=start, content_end=end, end=end)
    context = template.render(messages[:-1], add_generation_prompt=True).text
    if not text.startswith(context):
        raise TemplateRefusedError(
            "the rendering of an assistant turn does not begin with the generation prompt "
            f"{context[-40:]!r}"
        )
    if not text.endswith(closing.text) or len(text) - len(closing.text) < len(context):
        raise TemplateRefusedError(
            f"an assistant turn ends with {text[-40:]!r}, not with {closing.text!r}"
        )
    content_end = len(text) - len(closing.text)
    return AssistantTurn(
        text=text,
        start=len(context),
        content_end=content_end,
        end=content_end + closing.marker_end,
    )


def _end_in(turn: AssistantTurn, text: str) -> int | None:
    """Return up to where `text` is the same as the turn's own rendering, or None if too little is.

    Where only the end-of-turn marker differs (harmony closes the last turn with another token than
    earlier ones), the content is the same and the marker is left out of the span.
    """
    for end in (turn.end, turn.content_end):
        if text.startswith(turn.text[:end]):
            return end
    return None
