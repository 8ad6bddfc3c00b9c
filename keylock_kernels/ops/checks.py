"""Argument checks shared by the ops: each error names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .precision import FLOATING


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_text(shape: tuple[Any, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def check_tensor(op: str, name: str, value: Any, *, dims: int, like: str) -> None:
    """A floating-point tensor with ``dims`` dimensions; the one the others are compared with."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {like}, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise ValueError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {dtype_name(value.dtype)}")
    if value.dim() != dims:
        raise ValueError(f"{op}: {name} must be {like}, got {_shape_text(tuple(value.shape))}")


def check_like(
    op: str,
    name: str,
    value: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[Any, ...],  # ints, or a letter where any size will do
    device: torch.device,
) -> None:
    """``value`` has one of ``dtypes``, exactly ``shape``, and lives on ``device``."""
    if isinstance(value, Tensor) and value.dtype in dtypes and _fits(value.shape, shape):
        if value.device == device:
            return
        raise ValueError(f"{op}: {name} must be on {device}, got {value.device}")
    wanted = " or ".join(dict.fromkeys(dtype_name(d) for d in dtypes))
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be {wanted} {_shape_text(shape)}, got {type(value).__name__}")
    raise ValueError(
        f"{op}: {name} must be {wanted} {_shape_text(shape)}, "
        f"got {dtype_name(value.dtype)} {_shape_text(tuple(value.shape))}"
    )


def _fits(shape: torch.Size, wanted: tuple[Any, ...]) -> bool:
    if len(shape) != len(wanted):
        return False
    for have, want in zip(
        shape, wanted, strict=True
    ):  # all() would make a generator of it, for each argument of a call
        if have != want and not isinstance(want, str):
            return False
    return True


def side_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What may stand beside activations of ``dtype``: their own dtype, or float32."""
    return (dtype,) if dtype == torch.float32 else (torch.float32, dtype)
