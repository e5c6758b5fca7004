"""Rows of the target's embedding or head for a draft of another width.

Shapes: R rows, Ht target hidden, H draft hidden.
"""

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK_ROWS = 8192


def with_width(rows: Tensor, size: int) -> Tensor:
    """Return [R, H] for rows [R, Ht], H = `size`.

    A narrower draft gets their H principal directions: what keeps most of the rows' products. A
    wider one gets zeros in the further channels.
    """
    width = rows.shape[1]
    if size == width:
        return rows
    if size > width:
        return functional.pad(rows, (0, size - width))
    moments = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    for chunk in torch.split(rows, _CHUNK_ROWS):
        wide = chunk.double()
        moments += wide.T @ wide
    directions = torch.linalg.eigh(moments).eigenvectors[:, -size:]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    signed: Tensor = directions * largest.sign()  # an eigenvector has no sign of its own
    return rows @ signed.to(rows.dtype)
