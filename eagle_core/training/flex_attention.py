"""Training-time-test attention with torch's FlexAttention: one fused kernel over a full batch.

The kernel attends to the step-0 keys that a query sees and also returns the log-sum-exp of their
scores. Next to the query's own later keys, this result acts as one more key: its score is the
log-sum-exp, its value the attention output. Autograd differentiates both.

For GPUs with torch.compile only; elsewhere use `eagle_core.training.attention`, which is equal.

Shapes: A queries, S step-0 keys, I own keys per query, Hq heads, K key-value heads,
G = Hq / K, E head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from eagle_core.bfloat16 import widened
from eagle_core.errors import ConfigError
from eagle_core.training.attention import (
    in_window,
    keys_before,
    no_queries,
    packed_ttt_attention,
)
from eagle_core.training.step_plan import HostRows

_CHECKED_TOKENS = 400
_CHECKED_STARTS = (0, 170, 172)
_CHECKED_WINDOW = 100
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def flex_ttt_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    indices: Tensor,
    first: Tensor,
    window: int | None = None,
    *,
    host: HostRows | None = None,  # noqa: ARG001 (the same arguments)
) -> Tensor:
    """Compute `packed_ttt_attention`; same arguments and result."""
    if not len(query):
        return no_queries(query, keys, values)
    before = keys_before(window, own_keys.shape[1])
    own_keys, own_values = in_window(own_keys, window), in_window(own_values, window)
    with torch.autocast(query.device.type, enabled=False):  # dtypes are explicit here
        grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])  # [A, K, G, E]
        scores = torch.einsum("akge,aike->akgi", grouped, own_keys) * query.shape[-1] ** -0.5
        if before == -1:  # nothing of step 0 is in the window
            weights = widened(scores).softmax(dim=-1).to(query.dtype)
            return torch.einsum("akgi,aike->akge", weights, own_values).flatten(1, 2)
        oldest = first if before is None else torch.maximum(first, indices - before)
        attention_output, logsumexp = _attend_shared(query, keys, values, indices, oldest)
        scores = torch.cat([logsumexp.view_as(grouped[..., :1]), widened(scores)], dim=-1)
        weights = scores.softmax(dim=-1).to(query.dtype)
        shared = weights[..., :1] * attention_output.view_as(grouped)
        own = torch.einsum("akgi,aike->akge", weights[..., 1:], own_values)
        return (shared + own).flatten(1, 2)


def _attend_shared(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, oldest: Tensor
) -> tuple[Tensor, Tensor]:
    """Return [A, Hq, E] attention output over step 0, and [A, Hq] log-sum-exp of the scores.

    Queries [A] see the keys from `oldest` to `indices`.
    """

    def is_visible(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (oldest[row] <= key) & (key <= indices[row])

    mask = create_block_mask(is_visible, None, None, len(query), len(keys), device=query.device)
    attention_output, extra = _compiled()(
        *(states.transpose(0, 1).unsqueeze(0) for states in (query, keys, values)),
        block_mask=mask,
        enable_gqa=query.shape[1] != keys.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return attention_output[0].transpose(0, 1), extra.lse[0].T


def require_agreement(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> None:
    """Compare the kernel, and its gradients, with our own attention on a small case.

    A kernel that is wrong for a GPU or a size would silently train a useless draft. A `window` is
    compared by one that is short enough to hide keys of the small case.

    Raises:
        ConfigError: they differ by more than rounding.

    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    borders = torch.tensor(_CHECKED_STARTS, device=device)
    indices = torch.arange(_CHECKED_TOKENS, device=device)
    indices = indices[indices % 5 > 0]  # gaps, like those of prompts
    first = borders[torch.searchsorted(borders, indices, right=True) - 1]
    query = random(len(indices), num_heads, head_dim)
    keys, values = (random(_CHECKED_TOKENS, num_kv_heads, head_dim) for _ in range(2))
    own_keys, own_values = (random(len(indices), 2, num_kv_heads, head_dim) for _ in range(2))
    inputs = (query, keys, values, own_keys, own_values)
    slope = random(*query.shape).detach()
    shortened = None if window is None else min(window, _CHECKED_WINDOW)
    of_both = (
        attend(*inputs, indices, first, shortened)
        for attend in (flex_ttt_attention, packed_ttt_attention)
    )
    found, expected = (
        [attention_output, *torch.autograd.grad(attention_output, inputs, slope)]
        for attention_output in of_both
    )
    deviations = [
        (one - other).float().norm() / other.float().norm()
        for one, other in zip(found, expected, strict=True)
    ]
    worst = float(torch.stack(deviations).max())  # NaN if any of them is
    if not worst <= _ROUNDING[dtype]:
        raise ConfigError(
            f"training.compile: FlexAttention differs by {worst:.1e} from our own attention on "
            f"{device} in {dtype} ({num_heads} heads of size {head_dim}, {num_kv_heads} key-value "
            f"heads), but rounding explains only {_ROUNDING[dtype]:.0e}; set training.compile to "
            "false"
        )


@cache
def _compiled() -> Callable[..., Any]:
    """Return the fused kernel; the first call takes seconds."""
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled
