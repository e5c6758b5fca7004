"""JSON text in a field."""

import pytest

from eagle_core.data.records.fields import parsed


@pytest.mark.parametrize(
    "text", ["[" + "1" * 5000 + "]", '{"a": [-' + "1" * 5000 + "]}", "[" * 200_000, "[1,", "{a}"]
)
def test_text_that_cannot_be_parsed_stays_text(text: str) -> None:
    assert parsed(text) == text


def test_text_with_a_list_or_an_object_is_parsed() -> None:
    assert parsed(' [{"a": null}]') == [{"a": None}]
    assert parsed("17") == "17"
