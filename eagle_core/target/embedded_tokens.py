"""Token ids that a target has an embedding for."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig


def require_embedded(
    ids: NDArray[np.int32] | Sequence[int],
    num_rows: int,
    config: TargetConfig,
    *,
    where: str,
    name_of: Callable[[int], str] | None = None,
) -> None:
    """Raise ConfigError if a token id is beyond the embedding.

    Args:
        ids: token ids of one text.
        num_rows: rows of the embedding.
        config: the target.
        where: names the text.
        name_of: returns the token of an id.

    """
    largest = max(ids, default=0) if isinstance(ids, Sequence) else int(ids.max(initial=0))
    if largest >= num_rows:
        token = f"token {largest}" + (f" ({name_of(largest)})" if name_of else "")
        raise ConfigError(
            f"target {config.name}: {where} contains {token}, but the embedding has {num_rows:,} "
            "rows (vocab_size); use the tokenizer that belongs to these weights, resize the "
            "embedding of the model and save it, or remove the record"
        )
