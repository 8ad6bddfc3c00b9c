"""A layer with updates of low rank, composed of torch's own products, on any device.

In half precision the layer's product is rounded before the updates are added, and their sum once more.
"""

from __future__ import annotations

from torch import Tensor

from ..precision import accumulate_dtype
from ..rows import row_matmul
from . import reference
from .updates import Updates


def linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    updates: Updates,
) -> Tensor:  # [B, N, O]
    y = row_matmul(x, weight.mT).to(accumulate_dtype(x.dtype))
    return reference.finished(y + reference.added(x, updates, y.dtype), bias, output_scale).to(x.dtype)
