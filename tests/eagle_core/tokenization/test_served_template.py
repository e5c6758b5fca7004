"""What template a server is given, so that it renders what Eyas renders."""

import datetime as dt

import jinja2
import pytest

from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.served_template import served_template
from eagle_core.tokenization.template_source import TemplateSource

DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} {{ name }}"


def test_the_template_of_the_weights_is_left_to_the_server() -> None:
    source = TemplateSource(default="{{ a }}", with_tools="{{ b }}")
    assert served_template(source, TemplateConfig()) is None


def test_a_configured_template_is_handed_over() -> None:
    source = TemplateSource(default="{{ mine }}")
    assert served_template(source, TemplateConfig(chat_template="{{ mine }}")) == "{{ mine }}"


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_date_is_the_configured_one(quote: str) -> None:
    source = TemplateSource(default=DATED.replace("'", quote))
    text = served_template(source, TemplateConfig(date=dt.date(2024, 2, 3)))
    assert text is not None
    found = jinja2.Template(text).render(strftime_now=dt.date(1999, 1, 1).strftime, name="Ann")
    assert found == "03 Feb 2024 Ann"


def test_a_template_for_tools_stays_one() -> None:
    text = served_template(
        TemplateSource(default=DATED, with_tools="{{ tools }}"), TemplateConfig()
    )
    assert text is not None
    rendered = jinja2.Template(text)
    assert rendered.render(tools=["add"]) == "['add']"
    assert rendered.render(strftime_now=print, name="Ann") == "26 Jul 2024 Ann"
