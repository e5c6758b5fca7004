"""JSON values, of which Python does not convert integers of thousands of digits.

Such a number is no damage: the text around it is read, and one record is lost.
"""

import json
import sys

_DECODER = json.JSONDecoder()
_DIGITS_AS_TEXT = json.JSONDecoder(parse_int=str)


class TooManyDigits:
    """Stands for a value that has an integer of more digits than Python converts."""

    @property
    def detail(self) -> str:
        """What is wrong, for the ledger."""
        return f"an integer of more than {sys.get_int_max_str_digits()} digits"


def value_at(text: str, start: int = 0) -> tuple[object, int]:
    """Return the value that starts at `start`, and where it ends.

    The value is `TooManyDigits` if it has such an integer. Raises `json.JSONDecodeError` for what
    is not JSON, and `RecursionError`.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        _, end = _DIGITS_AS_TEXT.raw_decode(text, start)
        return TooManyDigits(), end


def value_of(text: str) -> object:
    """Return the value of a whole text, as `value_at` does; blanks around it do not count."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        json.loads(text, parse_int=str)
        return TooManyDigits()
