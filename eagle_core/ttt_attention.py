"""Attention of training-time test: causal over step-0 keys, plus the index's own later keys.

No T x T x steps matrix: a query at step i sees the step-0 keys at or before its index in its own
sequence, and the i keys that its own index made in steps 1..i.

Shapes: Q queries, S step-0 keys of one sequence, I own keys a query, N heads, K key-value heads,
G = N / K, E head size.
"""

import torch
from torch import Tensor


def ttt_attention(
    query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, index: Tensor
) -> Tensor:
    """Return mixed values [Q, N, E] for the queries of one sequence.

    Args:
        query: [Q, N, E]
        keys: [S, K, E], step 0; keys behind the last query may be left out.
        values: [S, K, E]
        own_keys: [Q, I, K, E], steps 1..i, oldest first.
        own_values: [Q, I, K, E]
        index: [Q] index of each query in its sequence.

    """
    num_queries, num_heads, head_dim = query.shape
    grouped = (
        query.reshape(num_queries, keys.shape[1], -1, head_dim) * head_dim**-0.5
    )  # [Q, K, G, E]
    causal = torch.einsum("qkge,ske->kgqs", grouped, keys)
    hidden = torch.arange(len(keys), device=index.device) > index.unsqueeze(1)
    causal = causal.masked_fill(hidden, float("-inf"))
    own = torch.einsum("qkge,qike->kgqi", grouped, own_keys)
    weights = torch.cat([causal, own], dim=-1).softmax(dim=-1)
    mixed = torch.einsum("kgqs,ske->qkge", weights[..., : len(keys)], values)
    mixed = mixed + torch.einsum("kgqi,qike->qkge", weights[..., len(keys) :], own_values)
    return mixed.reshape(num_queries, num_heads, head_dim)
