"""Fields that exclude an answer, or a whole record, from the loss."""

from collections.abc import Mapping

from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.records.fields import Fields

_MEASURED_KEY = "loss"
_TURN_KEYS = ("weight", "loss_mask", _MEASURED_KEY, "train", "training", "trainable")
_RECORD_KEYS = ("weight", "train", "training", "trainable")
_IN_THE_LOSS: Mapping[object, bool] = {
    1: True,  # equal to True and 1.0, with equal hashes
    0: False,
    "1": True,
    "0": False,
    "true": True,
    "false": False,
}


def is_supervised(turn: Fields, location: str) -> bool:
    """Return whether the loss counts an answer.

    Raises `RejectedRecord` for weights other than 0 and 1, and what is no flag. Another `loss` is
    a measured one, and stays unread.
    """
    is_counted = True
    for name in filter(turn.holds, _TURN_KEYS):
        flag = _flag(turn, name)
        if name == _MEASURED_KEY and flag is None:
            continue
        turn.ignore(name)
        if flag is None:
            detail = (
                f"{name} is {str(turn.see(name))[:40]!a}; only 1 and 0, or true and false, can be "
                "honoured"
            )
            raise RejectedRecord(Reason.UNSUPPORTED_WEIGHT, location, detail)
        is_counted = is_counted and flag
    return is_counted


def ignore_exclusion(turn: Fields) -> None:
    """Count fields as read that exclude a turn which the loss never counts."""
    turn.ignore(*(name for name in _TURN_KEYS if _flag(turn, name) is False))


def refuse_excluded(record: Fields, location: str) -> None:
    """Raise `RejectedRecord` for a record that excludes itself, such as `weight: 0`."""
    for name in _RECORD_KEYS:
        if _flag(record, name) is False:
            detail = f"{name} of the record is {str(record.see(name))[:40]}: it excludes itself"
            raise RejectedRecord(Reason.UNSUPPORTED_WEIGHT, location, detail)


def _flag(fields: Fields, name: str) -> bool | None:
    """Return 1 and 0 in any form as a flag, else None; a loss of 0.0 was measured."""
    value = fields.see(name)
    if isinstance(value, str):
        value = value.strip().lower()
    if name == _MEASURED_KEY and isinstance(value, float):
        return None
    return _IN_THE_LOSS.get(value) if isinstance(value, str | int | float) else None
