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
_outer_settings: dict[Any, str] = {}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, gates, sums and maps: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocasts(device: torch.device) -> bool:
    # Asking about a device that has no autocast, such as meta, is an error.
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_inputs(*tensors: Any) -> tuple[Any, ...]:
    """Cast activations as torch's autocast casts the inputs of linear and SDPA; float64 is left alone."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not _autocasts(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _matmul_settings() -> dict[Any, str]:
    """What the caller allows float32 products to lose, by who holds it; empty where nothing."""
    try:
        legacy = torch.get_float32_matmul_precision()
        return {} if legacy == "highest" else {None: legacy}
    except RuntimeError:  # set through the newer, per-backend settings: the two must not be mixed
        holders = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        return {holder: holder.fp32_precision for holder in holders}


def _apply(settings: dict[Any, str]) -> None:
    for holder, precision in settings.items():
        if holder is None:
            torch.set_float32_matmul_precision(precision)
        else:
            holder.fp32_precision = precision


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Full float32 products whatever the caller allowed: no tf32, no bf16 passes, no autocast."""
    global _inside, _outer_settings
    # The setting is one per process, so nested and concurrent entries share it: the first one in
    # saves it, the last one out puts it back.
    with _lock:
        if _inside == 0:
            _outer_settings = _matmul_settings()
            _apply({holder: "highest" if holder is None else "ieee" for holder in _outer_settings})
        _inside += 1
    try:
        if _autocasts(device):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _apply(_outer_settings)
