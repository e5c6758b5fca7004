"""How much arithmetic a training step needs, and how fast this machine multiplies matrices.

Needed multiply-adds of one step, for N tokens of width H (target width the same), draft of query
width Q, key-value width K (keys and values each), inner width I, draft vocabulary D. From the real
mask: A_i indices that take part in step i, R counted (index, step) pairs, U tokens that teach one,
P tokens whose step-0 keys some query sees, E tokens whose embedding enters a query, F tokens whose
embedding enters keys and values, C causal and own (query, key) pairs over all steps:

    fuse        P 3H H                             forward and weights: x 2
    embeddings  (E Q + F 2K) H                     x 3 (forward, weights, inputs)
    hidden      (sum A_i Q + (P + sum_{i>0} A_i) 2K) H          x 3
    output      sum A_i Q H                        x 3
    MLP         sum A_i 3 H I                      x 3
    attention   C 2Q                               x 3
    head        R H D                              x 3
    teacher     U H D                              x 1

Two floating-point operations each. Norms, softmax, rotary and optimizer are omitted: they are no
matrix products. No step can be faster than these at the measured rate of the fastest such product.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.step_case import Shape, StepCase
from eagle_core.training.config import TttConfig
from eagle_core.training.positions import ttt_positions

_PRODUCT_ROWS = {"cpu": 512, "cuda": 8192}
_PRODUCT_SECONDS = 0.3


def needed_operations(case: StepCase, options: TttConfig) -> Mapping[str, int]:
    """Return floating-point operations of each part of a step; the module has the formula."""
    mask = torch.tensor(case.loss_mask)
    positions = ttt_positions(
        loss_mask=mask,
        in_vocabulary=torch.ones_like(mask),
        starts=case.starts,
        ttt_length=case.ttt_length,
        positions=options.loss_positions,
        reduction=options.loss_reduction,
    )
    shape, indices = case.shape, positions.indices
    size, inner = shape.hidden_size, shape.intermediate_size
    query, keys = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    steps = range(case.ttt_length)
    rows = sum(len(index) for index in indices)
    seen = _seen(case.starts, indices[0])
    read = [indices[step] + 1 + step for step in steps]
    key_rows = len(seen) + sum(len(index) for index in indices[1:])
    counted = positions.counted.nonzero()
    taught_by = counted[:, 1] + 1 + counted[:, 0]
    multiply_adds = {
        "fuse": 2 * len(seen) * 3 * size * size,
        "embeddings": 3
        * (_num_unique(*read) * query + _num_unique(seen + 1, *read[1:]) * keys)
        * size,
        "hidden": 3 * (rows * query + key_rows * keys) * size,
        "output": 3 * rows * query * size,
        "MLP": 3 * rows * 3 * size * inner,
        "attention": 3 * _num_pairs(case.starts, indices) * 2 * query,
        "head": 3 * len(counted) * size * shape.draft_vocab_size,
        "teacher": _num_unique(taught_by) * size * shape.draft_vocab_size,
    }
    return {name: 2 * count for name, count in multiply_adds.items()}


def _seen(starts: tuple[int, ...], queries: Tensor) -> Tensor:
    """Return the tokens at or before the last query of their sequence."""
    parts = [queries.new_zeros(0)]
    for start, end in pairwise(starts):
        here = queries[(queries >= start) & (queries < end)]
        if len(here):
            parts.append(torch.arange(start, int(here[-1]) + 1))
    return torch.cat(parts)


def _num_unique(*tokens: Tensor) -> int:
    return len(torch.unique(torch.cat(tokens)))


def _num_pairs(starts: tuple[int, ...], indices: tuple[Tensor, ...]) -> int:
    borders = torch.tensor(starts)
    total = 0
    for step, index in enumerate(indices):
        first = borders[torch.searchsorted(borders, index, right=True) - 1]
        total += int((index - first + 1 + step).sum())
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductRate:
    """Floating-point operations per second of a matrix product, two per multiply-add."""

    cpu: float
    wall: float

    def faster(self, other: "ProductRate") -> "ProductRate":
        """Return the higher of both rates."""
        return ProductRate(cpu=max(self.cpu, other.cpu), wall=max(self.wall, other.wall))


def product_rate(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> ProductRate:
    """Return the rate of the fastest of three products of a step, in this process."""
    size, rows = shape.hidden_size, _PRODUCT_ROWS[device]
    best = ProductRate(cpu=0.0, wall=0.0)
    for sizes in (
        (rows, size, shape.draft_vocab_size),  # logits
        (shape.draft_vocab_size, rows, size),  # gradient of the head
        (rows, size, shape.intermediate_size),  # MLP
    ):
        best = best.faster(_rate(*sizes, dtype, device))
    return best


def _rate(m: int, k: int, n: int, dtype: torch.dtype, device: str) -> ProductRate:
    left = torch.randn(m, k, dtype=dtype, device=device)
    right = torch.randn(k, n, dtype=dtype, device=device)
    out = torch.empty(m, n, dtype=dtype, device=device)
    if device != "cpu":
        timer = Timer("torch.mm(left, right, out=out)", globals=locals() | {"torch": torch})
        rate = 2 * m * k * n / timer.blocked_autorange(min_run_time=_PRODUCT_SECONDS).median
        return ProductRate(cpu=rate, wall=rate)
    operations, repeats, best = 2 * m * k * n, 0, float("inf")
    torch.mm(left, right, out=out)
    until, cpu = time.perf_counter() + _PRODUCT_SECONDS, time.process_time()
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        best, repeats = min(best, time.perf_counter() - started), repeats + 1
    # Over all repeats: a single one may end before the other threads' time is counted.
    cpu = time.process_time() - cpu
    return ProductRate(cpu=repeats * operations / cpu, wall=operations / best)
