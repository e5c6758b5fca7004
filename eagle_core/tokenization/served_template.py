"""The chat template for a server, so that it renders as Eyas does."""

import datetime as dt
import re

from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.template_source import TemplateSource

_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def served_template(source: TemplateSource, config: TemplateConfig) -> str | None:
    """Return the Jinja text that a server is to render with; None if that of the weights will do.

    Where a template prints today's date, the text has the configured one.
    """
    default = _with_date(source.default, config.date)
    if source.with_tools is None:
        text = default
    else:  # a server that is given a text uses it with tools, too
        with_tools = _with_date(source.with_tools, config.date)
        text = f"{{% if tools %}}{with_tools}{{% else %}}{default}{{% endif %}}"
    is_own = config.chat_template is None and not _DATE.search(
        f"{source.default} {source.with_tools}"
    )
    return None if is_own else text


def _with_date(text: str, date: dt.date) -> str:
    return _DATE.sub(lambda found: repr(date.strftime(found[2])), text)
