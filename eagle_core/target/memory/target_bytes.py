"""How large a target is in memory, from the headers of its weight files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from transformers import PretrainedConfig

from eagle_core.safetensors_files import TensorHeader
from eagle_core.target.capture import LOGITS_CHUNK_TOKENS
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import target_dtype

_STATES_IN_A_LAYER = 24
"""Per token of the batch that runs: what attention and feed-forward block need."""
_LOGITS_COPIES = 3
_FLOAT = 4
_CAST = {"F64", "F32", "F16", "BF16"}
"""Types that are loaded in the target's dtype; others stay as they are."""
_STORED_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
"""Others have one."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetBytes:
    """Sizes of a target in the dtype in which it runs."""

    ends: int
    """Embedding, norm and head."""
    layers: tuple[int, ...]
    layers_on_disk: int
    """Of all together."""
    state: int
    """Of one token."""
    logits: int
    """Of the tokens whose logits are computed together."""

    @classmethod
    def of(
        cls,
        config: TargetConfig,
        model_config: PretrainedConfig,
        headers: Mapping[str, TensorHeader],
    ) -> "TargetBytes":
        """Return the sizes, from the headers of the weight files."""
        itemsize = target_dtype(config).itemsize
        sizes: dict[int, int] = {}
        on_disk = 0
        for name, header in headers.items():
            found, stored = _LAYER.search(name), _STORED_BYTES.get(header.dtype, 1)
            size = itemsize if header.dtype in _CAST else stored
            number = int(found[1]) if found else -1
            sizes[number] = sizes.get(number, 0) + prod(header.shape) * size
            on_disk += prod(header.shape) * stored if found else 0
        ends = sizes.pop(-1, 0)
        return cls(
            ends=ends,
            layers=tuple(sizes[number] for number in sorted(sizes)),
            layers_on_disk=on_disk,
            state=model_config.hidden_size * itemsize,
            logits=LOGITS_CHUNK_TOKENS * model_config.vocab_size * _FLOAT * _LOGITS_COPIES,
        )

    @property
    def whole(self) -> int:
        """Return the size of all weights."""
        return self.ends + sum(self.layers)

    def batch(self, batch_tokens: int) -> int:
        """Return what a batch takes while it runs."""
        return batch_tokens * self.state * _STATES_IN_A_LAYER + self.logits

    @property
    def layer(self) -> int:
        """Return the size of the largest layer."""
        return max(self.layers, default=0)
