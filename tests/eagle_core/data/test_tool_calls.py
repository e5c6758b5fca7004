"""Arguments of calls as templates get them."""

import sys

import pytest

from eagle_core.data.tool_calls import ToolCall

DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    "arguments", ['{"n": ' + "9" * 5000 + "}", "-" + "1" * 5000, DEEP, '{"a": ', "Rome"]
)
def test_arguments_that_cannot_be_parsed_stay_text(arguments: str) -> None:
    call = ToolCall(name="f", arguments=arguments).as_openai()
    assert call["function"] == {"name": "f", "arguments": arguments}


def test_arguments_are_parsed() -> None:
    digits = sys.get_int_max_str_digits()
    call = ToolCall(name="f", arguments=f'{{"n": {"1" * digits}}}', call_id="c").as_openai()
    assert call == {
        "type": "function",
        "id": "c",
        "function": {"name": "f", "arguments": {"n": int("1" * digits)}},
    }
