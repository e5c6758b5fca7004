"""Read tensors of a safetensors file that may be damaged."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.dumps.dump import MALFORMED

Found = TypeVar("Found")


def read_safetensors(
    path: Path, location: str, read: Callable[[Any], Found], *, required: Sequence[str]
) -> Found:
    """Return what `read` reads from an open file that has the `required` tensors.

    Raises:
        RejectedRecord: it is damaged, or lacks one of them.

    """
    try:
        with safe_open(path, framework="pt") as file:
            there = list(file.keys())
            if missing := [name for name in required if name not in there]:
                detail = f"{', '.join(missing)} missing; found {', '.join(there) or 'nothing'}"
                raise RejectedRecord(Reason.WRONG_KEYS, location, detail)
            return read(file)
    except (SafetensorError, OSError, *MALFORMED) as error:
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RejectedRecord(Reason.UNREADABLE, location, detail) from error
