"""Where a target's weights are: whole on one device, spread over GPUs, or one layer at a time.

The states are the same to the bit on devices of one kind, so a store does not record the placement.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eagle_core.errors import ConfigError
from eagle_core.target import weights
from eagle_core.target.capture import CapturingTarget
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine.vllm_target import VllmTarget
from eagle_core.target.layerwise.streamed import OnTokens, StreamedTarget, streamable_layers
from eagle_core.target.memory.free_memory import ALONE, Memory, MemoryShare
from eagle_core.target.memory.target_bytes import TargetBytes
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import (
    for_decoding,
    read_model_config,
    read_whole_config,
    resolve_device,
)

_USABLE = 0.9
"""Share of the free memory that is planned with."""
_LAYERS_ON_GPU = 2
"""The one that runs, and the one that takes its place."""
_LAYERS_IN_MAIN = 3
"""The one that is built, its tensors as they were read, and those of the next one."""
_WAITING_STATES = 2.5
"""Per token of a pass, between layers: the state, the embeddings, positions and a small mask."""
_WAITING_ON_GPU = 1.5
"""What stays on the GPU if the state itself waits in main memory."""
_CAPTURED_STATES = 4
"""Per token of a pass, in main memory: three aux states and the last one."""
_FEW_TOKENS = 65_536
"""If the GPU holds fewer tokens of a pass than these, the states wait in main memory instead."""
_MANY_TOKENS = 524_288
"""By default a pass has no more: reading is hidden, and a death of the process costs a pass."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A placement, and why."""

    placement: Literal["whole", "spread", "streamed", "vllm"]
    reason: str
    group_tokens: int = 0
    """Tokens that pass through a streamed layer together."""
    states_wait_in_main: bool = False
    """Whether the states between layers leave the GPU."""
    pass_bytes: int = 0
    """Of all layers, which a pass reads."""


def choose_placement(config: TargetConfig, sizes: TargetBytes, free: Memory) -> Chosen:
    """Choose a placement for a target by its size and the free memory.

    Raises:
        ConfigError: spread is wanted and there are no two GPUs, or not even two layers fit.

    """
    whole = _whole(config, sizes, free)
    return whole if whole is not None else _streamed(config, sizes, free)


def _whole(
    config: TargetConfig, sizes: TargetBytes, free: Memory, *, is_first: bool = False
) -> Chosen | None:
    """Return a placement of all weights in memory; None if they do not fit, or shall not.

    With `is_first`, `free` knows one GPU of several.
    """
    num_gpus, batch = len(free.gpus), sizes.batch(config.batch_tokens)
    reason = _reason(config, sizes, free)
    fits = sizes.whole + batch <= _USABLE * free.on_device
    if config.placement == "whole" or (config.placement == "auto" and fits):
        return Chosen(placement="whole", reason=reason)
    fits = num_gpus > 1 and sizes.whole + num_gpus * batch <= _USABLE * sum(free.gpus)
    if is_first:
        return None
    if config.placement == "spread" and _no_gpus(num_gpus):
        raise ConfigError(f"target {config.name}: {_no_gpus(num_gpus)}")
    if config.placement == "spread" or (config.placement == "auto" and fits):
        return Chosen(placement="spread", reason=reason)
    return None


def _reason(config: TargetConfig, sizes: TargetBytes, free: Memory) -> str:
    needed, usable = sizes.whole + sizes.batch(config.batch_tokens), _USABLE * free.on_device
    of_many = f" on one of {len(free.gpus)} GPUs" if len(free.gpus) > 1 else ""
    return f"its weights and a batch take {_gib(needed)}, and {_gib(usable)} may be used{of_many}"


def _no_gpus(num_gpus: int) -> str:
    """Return why a target cannot be spread over so few GPUs; empty if it can."""
    if num_gpus > 1:
        return ""
    return (
        f"target.placement is spread, but this process may use {num_gpus or 'no'} GPU: spread "
        "needs two or more; show it more (CUDA_VISIBLE_DEVICES; target.device without a number; "
        "with runner.num_workers above 1 each process sees one), or set target.placement to auto"
    )


def _streamed(config: TargetConfig, sizes: TargetBytes, free: Memory) -> Chosen:
    fixed = sizes.ends + sizes.batch(config.batch_tokens)
    fixed += sizes.layer * (_LAYERS_ON_GPU if free.gpus else _LAYERS_IN_MAIN)
    usable = int(_USABLE * free.on_device)
    room = usable - fixed, int(_USABLE * free.main) - _LAYERS_IN_MAIN * sizes.layer

    def most(*, in_main: bool) -> int:
        on_device, main = room
        if not free.gpus:
            return _fit(on_device, sizes.state * (_WAITING_STATES + _CAPTURED_STATES))
        waiting = _WAITING_ON_GPU if in_main else _WAITING_STATES
        held = _CAPTURED_STATES + (_WAITING_STATES if in_main else 0)
        return min(_fit(on_device, sizes.state * waiting), _fit(main, sizes.state * held))

    tokens, in_main = most(in_main=False), False
    if free.gpus and tokens < (config.stream_tokens or _FEW_TOKENS):
        with_main = most(in_main=True)
        tokens, in_main = max(tokens, with_main), with_main > tokens
    if tokens < config.batch_tokens:
        raise ConfigError(_does_not_fit(config, sizes, free, fixed))
    return Chosen(
        placement="streamed",
        reason=_reason(config, sizes, free),
        group_tokens=min(tokens, config.stream_tokens or _MANY_TOKENS),
        states_wait_in_main=in_main,
        pass_bytes=sizes.layers_on_disk,
    )


def _does_not_fit(config: TargetConfig, sizes: TargetBytes, free: Memory, fixed: int) -> str:
    batch = f"a batch of {config.batch_tokens:,} tokens"
    said = (
        f"target {config.name} does not fit on its device, not even layer by layer: some of its "
        f"layers, embedding, head and {batch} take {_gib(fixed)}, and "
        f"{_gib(_USABLE * free.on_device)} may be used"
    )
    if free.gpus:
        main = _LAYERS_IN_MAIN * sizes.layer + config.batch_tokens * sizes.state * _CAPTURED_STATES
        said += (
            f"; in main memory layers and states take {_gib(main)}, and {_gib(_USABLE * free.main)}"
            " may be used"
        )
    return f"{said}; lower target.batch_tokens or runner.num_workers, or use more memory"


def _fit(num_bytes: int, per_token: float) -> int:
    return max(0, int(num_bytes / per_token))


def placement_of(config: TargetConfig, share: MemoryShare = ALONE) -> Chosen:
    """Return the placement of a target on this machine, in a process with a share of its memory.

    Raises:
        ConfigError: no weights, or too little memory or too few GPUs.
        CorruptError: a weight file is damaged; names it.

    """
    given = _given(config)
    if given is not None:
        return given
    return place(config, weights.locate(config), _sizes(config), share)


def _given(config: TargetConfig) -> Chosen | None:
    """Return a placement that depends on no size."""
    if config.backend == "vllm":
        return Chosen(placement="vllm", reason="target.backend is vllm")
    if config.placement == "whole":
        return Chosen(placement="whole", reason="target.placement is whole")
    return None


def place(config: TargetConfig, folder: Path, sizes: TargetBytes, share: MemoryShare) -> Chosen:
    """Return the placement of a target of these sizes, whose config.json is in `folder`.

    Raises:
        ConfigError: too little memory or too few GPUs.

    """
    given = _given(config)
    if given is not None:
        return given
    device = resolve_device(config.device)
    # The others are not touched if the first GPU suffices: they may be in use.
    free = Memory.free(device, share, most_gpus=1)
    if config.placement != "streamed" and _whole(config, sizes, free, is_first=True) is None:
        free = Memory.free(device, share)
    if config.placement == "auto" and _whole(config, sizes, free) is None:
        obstacle = _why_not_streamed(config, folder)
        if obstacle:
            logger.warning("target %s may not fit: %s", config.name, _reason(config, sizes, free))
            return Chosen(placement="whole", reason=obstacle)
    return choose_placement(config, sizes, free)


def _why_not_streamed(config: TargetConfig, folder: Path) -> str:
    try:
        streamable_layers(config, read_whole_config(config, folder))
    except ConfigError as error:
        return str(error)
    return ""


def _sizes(config: TargetConfig) -> TargetBytes:
    folder = weights.locate(config)
    model_config = read_model_config(config, folder)
    return TargetBytes.of(config, model_config, weights.read_weight_headers(config, folder))


def load_target(
    config: TargetConfig,
    *,
    share: MemoryShare = ALONE,
    on_tokens: OnTokens = lambda _tokens: None,
) -> CapturingTarget:
    """Load a target to capture states with, placed as `target.placement` says.

    Args:
        config: the target.
        share: what this process may take of the memory.
        on_tokens: called after each batch in each streamed layer, with that part of its tokens.

    Raises:
        ConfigError: no weights, an architecture that is not supported, or too little memory.
        CorruptError: weights are missing, left over, or of another shape; names them.

    """
    return load_placed(config, placement_of(config, share), on_tokens=on_tokens)


def load_placed(
    config: TargetConfig, chosen: Chosen, *, on_tokens: OnTokens = lambda _tokens: None
) -> CapturingTarget:
    """Load a target as `chosen`; else as `load_target`."""
    if chosen.placement == "vllm":
        return VllmTarget.load(config)
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
        ConfigError: as `load_target`; or this machine cannot decode it (`why_not_decoded`).
        CorruptError: weights are missing, left over, or of another shape; names them.

    """
    config = for_decoding(config)
    obstacle = why_not_decoded(config)
    if obstacle:
        raise ConfigError(f"target {config.name}: {obstacle}")
    if config.placement != "auto":
        return _loaded(config, Chosen(placement=config.placement, reason="as set"))
    device, needed = resolve_device(config.device), _sizes(config).whole
    # On one GPU the allocator decides: what this process holds for nothing is given back.
    is_spread = (
        len(Memory.all(device).gpus) > 1
        and needed > _USABLE * Memory.free(device, most_gpus=1).on_device
    )
    return _loaded(config, Chosen(placement="spread" if is_spread else "whole", reason="to decode"))


def why_not_decoded(config: TargetConfig) -> str:
    """Return why a target cannot be decoded on this machine, and what to do; empty if it can.

    Goes by the memory that there is, used or free, and takes none of a GPU.

    Raises:
        ConfigError: no weights.
        CorruptError: a weight file is damaged; names it.

    """
    config = for_decoding(config)
    if config.placement == "whole":
        return ""
    if config.placement == "streamed":
        return (
            "decoding runs all layers for each token, which target.placement streamed would load "
            "again each time; set target.placement to auto, whole or spread, or measure with "
            "`eyas run estimate RECIPE` from stored states"
        )
    there = Memory.all(resolve_device(config.device))
    if config.placement == "spread":
        return _no_gpus(len(there.gpus))
    sizes, room = _sizes(config), sum(there.gpus) or there.main
    if sizes.whole <= room:
        return ""
    return (
        f"decoding runs all layers for each token, but they do not fit: {_gib(sizes.whole)} of "
        f"weights, and the device has {_gib(room)}; use one with more memory or more GPUs, or "
        "measure with `eyas run estimate RECIPE` from stored states"
    )


def decoding_bytes(config: TargetConfig) -> int:
    """Return the size of a target's weights in memory when it decodes."""
    return _sizes(for_decoding(config)).whole


def _loaded(config: TargetConfig, chosen: Chosen) -> TargetModel:
    if chosen.placement == "spread":
        logger.info("target %s is spread over all visible GPUs: %s", config.name, chosen.reason)
    return TargetModel.load(config, is_spread=chosen.placement == "spread")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
