"""Where a target's weights are: whole on one device, spread over GPUs, or one layer at a time.

The states are the same to the bit on devices of one kind, so a store does not record the placement.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from transformers import PretrainedConfig

from eagle_core.bfloat16 import DTYPES
from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import TensorHeader
from eagle_core.target import weights
from eagle_core.target.capture import LOGITS_CHUNK_TOKENS, CapturingTarget
from eagle_core.target.config import TargetConfig
from eagle_core.target.free_memory import FreeMemory
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import read_model_config, resolve_device
from eagle_core.target.streamed import OnTokens, StreamedTarget

_USABLE = 0.9
"""Share of the free memory that is planned with."""
_LAYERS_AT_ONCE = 2
"""The one that runs, and the one that is read meanwhile."""
_WAITING_STATES = 2.0
"""Per token of a pass, between layers: the state, its mask and positions."""
_WAITING_IN_MAIN = 0.5
"""What stays on the GPU of these if the state itself waits in main memory."""
_CAPTURED_STATES = 4
"""Per token of a pass, in main memory: three aux states and the last one."""
_STATES_IN_A_LAYER = 24
"""Per token of the batch that runs: what attention and feed-forward block need."""
_LOGITS_COPIES = 3
_FLOAT = 4
_FEW_TOKENS = 65_536
"""If the GPU holds fewer tokens of a pass than these, the states wait in main memory instead."""
_MANY_TOKENS = 524_288
"""By default a pass has no more: reading is hidden, and a death of the process costs a pass."""
_CAST = {"F64", "F32", "F16", "BF16"}
"""Types that are loaded in the target's dtype; others stay as they are."""
_STORED_BYTES = {"I64": 8, "I32": 4}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetBytes:
    """Sizes of a target in the dtype in which it runs."""

    ends: int
    """Embedding, norm and head."""
    layers: tuple[int, ...]
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
        itemsize = DTYPES[config.dtype].itemsize
        sizes: dict[int, int] = {}
        for name, header in headers.items():
            found = _LAYER.search(name)
            size = itemsize if header.dtype in _CAST else _STORED_BYTES.get(header.dtype, 1)
            number = int(found[1]) if found else -1
            sizes[number] = sizes.get(number, 0) + prod(header.shape) * size
        ends = sizes.pop(-1, 0)
        return cls(
            ends=ends,
            layers=tuple(sizes[number] for number in sorted(sizes)),
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

    def streamed(self, batch_tokens: int) -> int:
        """Return what a streamed target takes, but for the states between layers."""
        layer = max(self.layers, default=0)
        return self.ends + _LAYERS_AT_ONCE * layer + self.batch(batch_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A placement, and why."""

    placement: Literal["whole", "spread", "streamed"]
    reason: str
    group_tokens: int = 0
    """Tokens that pass through a streamed layer together."""
    states_wait_in_main: bool = False
    """Whether the states between layers leave the GPU."""
    pass_bytes: int = 0
    """Of all layers, which a pass reads."""


def choose_placement(config: TargetConfig, sizes: TargetBytes, free: FreeMemory) -> Chosen:
    """Choose a placement for a target by its size and the free memory.

    Raises:
        ConfigError: spread is wanted and there are no two GPUs, or not even two layers fit.

    """
    whole = _whole(config, sizes, free)
    return whole if whole is not None else _streamed(config, sizes, free)


def _whole(config: TargetConfig, sizes: TargetBytes, free: FreeMemory) -> Chosen | None:
    """Return a placement of all weights in memory; None if they do not fit, or shall not."""
    num_gpus, batch = len(free.gpus), sizes.batch(config.batch_tokens)
    reason = _reason(config, sizes, free)
    fits = sizes.whole + batch <= _USABLE * free.on_device
    if config.placement == "whole" or (config.placement == "auto" and fits):
        return Chosen(placement="whole", reason=reason)
    fits = num_gpus > 1 and sizes.whole + num_gpus * batch <= _USABLE * sum(free.gpus)
    if config.placement == "spread":
        _require_gpus(config, num_gpus)
    if config.placement == "spread" or (config.placement == "auto" and fits):
        return Chosen(placement="spread", reason=reason)
    return None


def _reason(config: TargetConfig, sizes: TargetBytes, free: FreeMemory) -> str:
    needed, usable = sizes.whole + sizes.batch(config.batch_tokens), _USABLE * free.on_device
    of_many = f" on one of {len(free.gpus)} GPUs" if len(free.gpus) > 1 else ""
    return f"its weights and a batch take {_gib(needed)}, and {_gib(usable)} may be used{of_many}"


def _require_gpus(config: TargetConfig, num_gpus: int) -> None:
    if num_gpus < 2:
        raise ConfigError(
            f"target {config.name}: target.placement is spread, but this process sees "
            f"{num_gpus or 'no'} GPU: spread needs two or more; show it more "
            "(CUDA_VISIBLE_DEVICES; with runner.num_workers above 1 each process sees one), or set "
            "target.placement to streamed"
        )


def _streamed(config: TargetConfig, sizes: TargetBytes, free: FreeMemory) -> Chosen:
    batch_tokens = config.batch_tokens
    fixed = sizes.streamed(batch_tokens)
    usable, main = int(_USABLE * free.on_device), int(_USABLE * free.main)

    def most(*, in_main: bool) -> int:
        if not free.gpus:
            return _fit(usable - fixed, sizes.state * (_WAITING_STATES + _CAPTURED_STATES))
        on_gpu = _fit(
            usable - fixed, sizes.state * (_WAITING_IN_MAIN if in_main else _WAITING_STATES)
        )
        held = _CAPTURED_STATES + (_WAITING_STATES if in_main else 0)
        return min(on_gpu, _fit(main, sizes.state * held))

    tokens, in_main = most(in_main=False), False
    if free.gpus and tokens < (config.stream_tokens or _FEW_TOKENS):
        with_main = most(in_main=True)
        tokens, in_main = max(tokens, with_main), with_main > tokens
    if tokens < batch_tokens:
        raise ConfigError(
            f"target {config.name} does not fit on its device, not even layer by layer: two of its "
            f"layers, embedding, head and a batch of {batch_tokens:,} tokens take "
            f"{_gib(fixed)}, and {_gib(usable)} may be used; lower target.batch_tokens, or use a "
            "device with more memory"
        )
    return Chosen(
        placement="streamed",
        reason=_reason(config, sizes, free),
        group_tokens=min(tokens, config.stream_tokens or _MANY_TOKENS),
        states_wait_in_main=in_main,
        pass_bytes=sum(sizes.layers),
    )


def _fit(num_bytes: int, per_token: float) -> int:
    return max(0, int(num_bytes / per_token))


def placement_of(config: TargetConfig, *, num_processes: int = 1) -> Chosen:
    """Return the placement of a target on this machine.

    Args:
        config: the target.
        num_processes: how many processes share the device.

    Raises:
        ConfigError: no weights, or too little memory or too few GPUs.
        CorruptError: a weight file is damaged; names it.

    """
    if config.placement == "whole":
        return Chosen(placement="whole", reason="target.placement is whole")
    return choose_placement(config, *_sizes_and_memory(config, num_processes))


def _sizes_and_memory(config: TargetConfig, num_processes: int) -> tuple[TargetBytes, FreeMemory]:
    folder = weights.locate(config)
    model_config = read_model_config(config, folder)
    sizes = TargetBytes.of(config, model_config, weights.read_weight_headers(config, folder))
    return sizes, FreeMemory.of(resolve_device(config.device), num_processes=num_processes)


def load_target(
    config: TargetConfig,
    *,
    num_processes: int = 1,
    on_tokens: OnTokens = lambda _tokens: None,
) -> CapturingTarget:
    """Load a target to capture states with, placed as `target.placement` says.

    Args:
        config: the target.
        num_processes: how many processes share the device.
        on_tokens: called after each streamed layer, with the layer's share of the pass's tokens.

    Raises:
        ConfigError: no weights, an architecture that is not supported, or too little memory.
        CorruptError: weights are missing, left over, or of another shape; names them.

    """
    return load_placed(
        config, placement_of(config, num_processes=num_processes), on_tokens=on_tokens
    )


def load_placed(
    config: TargetConfig, chosen: Chosen, *, on_tokens: OnTokens = lambda _tokens: None
) -> CapturingTarget:
    """Load a target as `chosen`; else as `load_target`."""
    if chosen.placement != "streamed":
        return _loaded(config, chosen)
    logger.info(
        "target %s runs layer by layer, %s tokens at a time: %s",
        *(config.name, f"{chosen.group_tokens:,}", chosen.reason),
    )
    return StreamedTarget.load(
        config,
        group_tokens=chosen.group_tokens,
        states_wait_in_main=chosen.states_wait_in_main,
        on_tokens=on_tokens,
    )


def load_decoding_target(config: TargetConfig) -> TargetModel:
    """Load a target to decode with: all layers stay in memory, for each token passes all of them.

    Raises:
        ConfigError: as `load_target`; or `target.placement` is streamed, or would have to be.
        CorruptError: weights are missing, left over, or of another shape; names them.

    """
    found = _for_decoding(config)
    if isinstance(found, str):
        raise ConfigError(f"target {config.name}: {found}")
    return _loaded(config, found)


def why_not_decoded(config: TargetConfig) -> str:
    """Return why a target cannot be decoded on this machine, and what to do; empty if it can.

    Raises:
        ConfigError: no weights, or too few GPUs for what is set.
        CorruptError: a weight file is damaged; names it.

    """
    found = _for_decoding(config)
    return found if isinstance(found, str) else ""


def _for_decoding(config: TargetConfig) -> Chosen | str:
    """Return where a target is decoded, or why it is not."""
    if config.placement == "streamed":
        return (
            "decoding runs all layers for each token, which target.placement streamed would load "
            "again each time; set target.placement to auto, whole or spread, or use "
            "`eyas run estimate RECIPE`, which needs no target"
        )
    if config.placement == "whole":
        return placement_of(config)
    sizes, free = _sizes_and_memory(config, 1)
    small_batches = config.model_copy(update={"batch_tokens": 1})
    found = _whole(small_batches, sizes, free)
    return found or (
        f"decoding runs all layers for each token, but they do not fit: {_gib(sizes.whole)} of "
        f"weights, and {_gib(_USABLE * sum(free.gpus or [free.main]))} may be used; use a device "
        "with more memory or more GPUs, or `eyas run estimate RECIPE`, which needs no target"
    )


def _loaded(config: TargetConfig, chosen: Chosen) -> TargetModel:
    if chosen.placement == "spread":
        logger.info("target %s is spread over all visible GPUs: %s", config.name, chosen.reason)
    return TargetModel.load(config, is_spread=chosen.placement == "spread")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
