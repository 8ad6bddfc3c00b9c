"""What every op accumulates in, and the torch settings its products must not inherit."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_lock = threading.Lock()
_inside = 0
_outer_precision = "highest"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, gates, sums and maps: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_inputs(*tensors: Any) -> tuple[Any, ...]:
    """Cast activations as torch's autocast casts the inputs of linear and SDPA; float64 is left alone."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Full float32 products whatever the caller allowed: no tf32, no bf16 passes, no autocast."""
    global _inside, _outer_precision
    # The matmul precision is one setting per process, so nested and concurrent entries share it:
    # the first one in saves it, the last one out puts it back.
    with _lock:
        if _inside == 0:
            _outer_precision = torch.get_float32_matmul_precision()
            if _outer_precision != "highest":
                torch.set_float32_matmul_precision("highest")
        _inside += 1
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _outer_precision != "highest":
                torch.set_float32_matmul_precision(_outer_precision)
