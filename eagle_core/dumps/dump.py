"""What another tool dumped: rows of token ids with hidden states, read one at a time.

A format lists its rows without reading states. Reading a row checks that it has what the format
promises; whether this fits a target is for `completion` to decide.

Shapes: T tokens, A aux layers, H hidden size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from eagle_core.data.ledger import Reason, RejectedRecord

FormatName = Literal["specforge", "speculators", "model-optimizer", "nemo"]
MALFORMED = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RuntimeError,
    OverflowError,
    MemoryError,
)
"""What reading can raise where a file holds other things than its format promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpedStates:
    """The tensors of one row, as they were stored."""

    input_ids: Tensor
    """[T]"""
    loss_mask: Tensor | None
    """[T], 1 where the target wrote the token; None if the dump has no mask."""
    attention_mask: Tensor | None = None
    """[T], 0 for padding; None if not stored."""
    aux: Tensor
    """[T, A * H] or [T, A, H]"""
    last: Tensor | None
    """[T, H]; None if the dump lacks it."""
    last_is_normed: bool
    """Whether `last` is the state after the final norm."""
    lacks_first_token: bool = False
    """Whether ids and mask are shifted: those of the first token are missing, and the last is a
    filler."""
    padding_id: int | None = None
    """An id that the tool pads with, whatever the tokenizer's pad token is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpRow:
    """A row that is not read yet."""

    location: str
    """File, and position in it if it holds several."""
    file: Path
    load: Callable[[], DumpedStates]
    """Reads it from its file; use `read`."""
    covered_by: tuple[str, ...] = ()
    """Locations of other rows that begin with the same tokens, and hold all that this one does."""

    def read(self) -> DumpedStates:
        """Return the row; RejectedRecord says what is wrong with its file, whatever that is."""
        try:
            return self.load()
        except RejectedRecord as rejected:
            if rejected.location:
                raise
            raise RejectedRecord(rejected.reason, self.location, rejected.detail) from rejected
        except MALFORMED as error:
            detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise RejectedRecord(Reason.UNREADABLE, self.location, detail) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Dump:
    """All rows of a dump, in the order in which to read them."""

    format: FormatName
    rows: Iterable[DumpRow]
    """May be iterated over several times."""
    num_rows: int
    has_masks: bool
    """Whether rows come with a loss mask, as far as one can tell before reading them."""
    has_last: bool = True
    """Whether rows have a last state."""
    aux_layers: Sequence[int] | None = None
    """The captured decoder layers, 0-based, if the dump records them."""
    origin: str = ""
    """What the dump says about itself, such as the name of its target."""
