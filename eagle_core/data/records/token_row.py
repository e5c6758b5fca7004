"""Records that are token ids already: `input_ids` with a mask of what the target wrote."""

from collections.abc import Sequence

from eagle_core.data.conversation import TokenRow
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.records.fields import Fields, is_list, parsed

IDS_KEY = "input_ids"
_MASK_KEYS = ("loss_mask", "assistant_masks", "assistant_mask")
_LABELS_KEY = "labels"
_ATTENTION_KEY = "attention_mask"
_NO_LABEL = -100
"""Label of a token without loss, in transformers."""
_MAX_ID = 2**31


def has_token_ids(fields: Fields) -> bool:
    """Return whether the record has a list of token ids."""
    return is_list(parsed(fields.see(IDS_KEY)))


def read_token_row(fields: Fields, *, location: str) -> TokenRow:
    """Return ids and mask of a record.

    The mask is `loss_mask` or `assistant_masks` (1 for the target's tokens), or what `labels` has
    no -100 for. Padding, where `attention_mask` is 0, is cut. Raises `RejectedRecord` without a
    mask, or if the lists do not fit together.
    """
    ids = _numbers(fields, IDS_KEY, location)
    if not all(0 <= one < _MAX_ID for one in ids):
        wrong = next(one for one in ids if not 0 <= one < _MAX_ID)
        raise RejectedRecord(Reason.BAD_TOKENS, location, f"{IDS_KEY} has {wrong}")
    mask = _mask(fields, ids, location)
    kept = [True] * len(ids)
    if fields.holds(_ATTENTION_KEY):
        kept = _flags(fields, _ATTENTION_KEY, len(ids), location)
    first = next((at for at, is_kept in enumerate(kept) if is_kept), len(ids))
    last = len(ids) - next((at for at, is_kept in enumerate(reversed(kept)) if is_kept), len(ids))
    if not all(kept[first:last]):
        raise RejectedRecord(Reason.BAD_TOKENS, location, f"{_ATTENTION_KEY} has gaps")
    if not any(mask[first:last]):
        raise RejectedRecord(Reason.NO_ASSISTANT_TURN, location, "its mask supervises no token")
    return TokenRow(input_ids=tuple(ids[first:last]), loss_mask=tuple(mask[first:last]))


def _mask(fields: Fields, ids: Sequence[int], location: str) -> list[bool]:
    name = next((name for name in _MASK_KEYS if is_list(parsed(fields.see(name)))), None)
    if name is not None:
        return _flags(fields, name, len(ids), location)
    if not is_list(parsed(fields.see(_LABELS_KEY))):
        named = ", ".join((*_MASK_KEYS[:2], _LABELS_KEY))
        raise RejectedRecord(Reason.BAD_TOKENS, location, f"{IDS_KEY} without any of {named}")
    labels = _numbers(fields, _LABELS_KEY, location)
    _require_length(_LABELS_KEY, labels, len(ids), location)
    pairs = zip(ids, labels, strict=True)
    other = next(
        (at for at, (one, label) in enumerate(pairs) if label not in {one, _NO_LABEL}), None
    )
    if other is not None:
        detail = f"{_LABELS_KEY}[{other}] is {labels[other]}, but {IDS_KEY} has {ids[other]}"
        raise RejectedRecord(Reason.BAD_TOKENS, location, f"{detail}: labels must not be shifted")
    return [label != _NO_LABEL for label in labels]


def _flags(fields: Fields, name: str, length: int, location: str) -> list[bool]:
    numbers = _numbers(fields, name, location)
    _require_length(name, numbers, length, location)
    if not set(numbers) <= {0, 1}:
        wrong = next(one for one in numbers if one not in {0, 1})
        raise RejectedRecord(Reason.BAD_TOKENS, location, f"{name} has {wrong}, not 0 or 1")
    return [one == 1 for one in numbers]


def _require_length(name: str, values: Sequence[int], length: int, location: str) -> None:
    if len(values) != length:
        detail = f"{name} has {len(values)} entries, {IDS_KEY} {length}"
        raise RejectedRecord(Reason.BAD_TOKENS, location, detail)


def _numbers(fields: Fields, name: str, location: str) -> list[int]:
    """Return a list of whole numbers; a batch of one counts as its only row."""
    values = parsed(fields.see(name))
    fields.ignore(name)
    if is_list(values) and len(values) == 1 and is_list(values[0]):
        values = values[0]
    if not is_list(values):
        raise RejectedRecord(Reason.BAD_TOKENS, location, f"{name} is {type(values).__name__}")
    wrong = next((one for one in values if not _is_whole(one)), None)
    found = [int(one) for one in values if isinstance(one, int | float) and _is_whole(one)]
    if len(found) != len(values):
        detail = f"{name} has {str(wrong)[:20]!a}, not whole numbers"
        raise RejectedRecord(Reason.BAD_TOKENS, location, detail)
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
