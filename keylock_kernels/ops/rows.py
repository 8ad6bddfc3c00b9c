"""Products in which a batch row is the same to the bit wherever it stands in the batch.

On a CPU, BLAS picks its inner kernel by the address of each operand, and how it splits one tall
product over threads depends on where a row falls. Two rules make the result a function of the row
alone: one product per row, and every row's operands start on a cache line. Sizes that break the
second rule (real models' do not) are padded with zeros, which changes no sum. So are narrow
matrices: a handful of updates per row becomes one width, and how many a neighbour takes is no matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE_LINE = 64  # bytes
LANE = 16  # elements: a cache line of float32, two of float64


def round_up(size: int) -> int:
    return -(-size // LANE) * LANE


def starts_on_lines(tensor: Tensor) -> bool:
    """Whether all batch rows of a CPU tensor start equally aligned."""
    return tensor.shape[0] <= 1 or tensor.stride(0) * tensor.element_size() % CACHE_LINE == 0


def row_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a[i] @ b[i]`` for every row i: [B, M, K] times [B, K, N] (or one [K, N] for all rows)."""
    if a.device.type != "cpu":
        return a @ b
    inner, columns = b.shape[-2:]
    cells = (a.shape[1] * inner, inner * columns, a.shape[1] * columns)
    narrow = min(inner, columns) < LANE
    if narrow or any(cell * a.element_size() % CACHE_LINE for cell in cells):
        a = F.pad(a, (0, round_up(inner) - inner))
        b = F.pad(b, (0, round_up(columns) - columns, 0, round_up(inner) - inner))
    if not starts_on_lines(a):
        a = a.contiguous()
    if b.dim() == 2:
        b = b.expand(a.shape[0], *b.shape)
    elif not starts_on_lines(b):
        b = b.contiguous()
    return torch.bmm(a, b)[..., :columns]


def row_sigmoid(z: Tensor) -> Tensor:
    """The logistic function, the same to the bit wherever an element lies in memory.

    torch's elementwise kernels on a CPU finish each thread's share with scalar code, whose exp
    differs from the vector one in the last bit. A softmax over (z, 0) goes element by element.
    """
    if z.device.type != "cpu":
        return torch.sigmoid(z)
    z = z.clamp(-750, 750)  # where exp has long been 0 in float64; infinities would make NaN
    return torch.stack((z, torch.zeros_like(z)), -1).softmax(-1)[..., 0]
