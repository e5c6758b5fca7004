"""Attention over a tree of tokens: which targets can have it, its mask, what a cache keeps of it.

Shapes: T tokens, S entries of the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eagle_core.errors import ConfigError

_WITH_MASKS = ("sdpa", "eager")
"""Attention of transformers that adds a mask of any form."""
_NO_TREES = "evaluation.tree cannot be used with target {name}: {why}; leave it out to draft chains"


def require_tree_masks(name: str, attention: str | None) -> None:
    """Raise ConfigError if an attention of transformers takes no mask of a tree."""
    if attention not in _WITH_MASKS:
        why = f"its attention ({attention}) takes no mask of a tree; set target.attention=sdpa"
        raise ConfigError(_NO_TREES.format(name=name, why=why))


def require_tree_attention(
    name: str, model_config: PretrainedConfig, *, attention: str | None, num_tokens: int
) -> None:
    """Raise ConfigError if trees are not right over `num_tokens` tokens, drafted ones included.

    A sliding window must not end inside the text: on a path, tokens are nearer to each other than
    their entries in the cache.
    """
    require_tree_masks(name, attention)
    for layer in DynamicCache(config=model_config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            why = f"the cache of its layers ({type(layer).__name__}) cannot keep one path of a tree"
            raise ConfigError(_NO_TREES.format(name=name, why=why))
        if isinstance(layer, DynamicSlidingWindowLayer) and num_tokens >= layer.sliding_window:
            why = (
                f"a text of up to {num_tokens} tokens, with its tree, exceeds the sliding window "
                f"of {layer.sliding_window}"
            )
            raise ConfigError(_NO_TREES.format(name=name, why=why))


def added_mask(visible: Tensor, num_cached: int, dtype: torch.dtype) -> Tensor:
    """Return [1, 1, T, S + T] what is added to attention scores.

    `visible` [T, T] says which of the tokens each one sees; all see the entries of the cache.
    """
    seen = torch.cat([visible.new_ones(len(visible), num_cached), visible], dim=1)
    added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return added.masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def keep_entries(cache: DynamicCache, kept: Sequence[int], *, num_new: int) -> None:
    """Keep only the entries `kept`, ascending, of the newest `num_new` of every layer."""
    start = cache.get_seq_length() - num_new
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)  # noqa: S101 (require_tree_attention)
        if layer.keys is None or layer.values is None:  # it shares those of another layer
            continue
        rows = torch.tensor([start + row for row in kept], device=layer.keys.device)
        for entries in (layer.keys, layer.values):
            entries[:, :, start : start + len(kept)] = entries[:, :, rows]
    cache.crop(len(kept) - num_new)
