"""Calls of the C++ kernels of csrc/cpu/: checks, memory for the results, one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ..checks import check_like
from ..precision import accumulate_dtype, exact_products
from . import reference
from .updates import Updates


def linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    updates: Updates,
) -> Tensor:  # [B, N, O]
    """The layer in one kernel where the CPU has one for its dtype, else torch's product and the update's kernel."""
    if (
        updates.offsets is not None and updates.max_rank < updates.up.shape[0]
    ):  # a promise that the kernels do not look at
        updates = updates.checked("linear")
    if _multiplies(x):
        return low_rank_linear(x, weight, bias, output_scale, updates)
    updates = updates.checked("linear")
    with exact_products(x.device):
        wide = reference.base_product(x, weight)
    # New memory would cost more than the update; a product of padded matrices is a part of its own.
    y = _updated(wide, x.to(wide.dtype), updates, wide if wide.is_contiguous() else None, None)
    return reference.finished(y, bias, output_scale).to(x.dtype)


def update(base: Tensor, x: Tensor | None, updates: Updates) -> Tensor:  # [B, N, O], [B, N, K] -> [B, N, O]
    if updates.offsets is not None and updates.max_rank < updates.up.shape[0]:
        updates = updates.checked("update")
    return low_rank_update(base, x, updates)


def added_backward(
    grad: Tensor,  # [B, N, O]
    up: Tensor,  # [P, O]
    rows: Tensor,  # [B, R]
    c: Tensor,  # [B, N, R]
    need_up: bool,
    need_c: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.added_backward`: one pass over grad for few updates, torch's products for many."""
    if rows.shape[1] > _FEW:
        return reference.added_backward(grad, up, rows, c, need_up, need_c)
    return low_rank_backward(grad, up, rows.int(), c, need_up, need_c)


_FEW = 4  # updates a row


def _multiplies(x: Tensor) -> bool:
    """Whether this CPU has a product of its own for x [B, N, K]."""
    best = native.instruction_set("low_rank_linear", None).name
    if x.dtype == torch.float32:
        return best.startswith("avx512")
    return x.dtype == torch.bfloat16 and x.shape[2] % 2 == 0 and best == "avx512_bf16"


def low_rank_linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    updates: Updates,
) -> Tensor:  # [B, N, O]
    """The whole layer in one kernel: sums in float32, one rounding.

    Args:
        x: [B, N, K] float32, or bfloat16 with an even K.
        weight: [O, K], x's dtype.
        bias, output_scale: float32 or bfloat16.
        updates: tables in float32 or bfloat16; gates are not read: their coefficients must be given.

    Returns:
        [B, N, O], contiguous, of x's dtype.

    Raises:
        ValueError: a tensor is not on the CPU, or a slot or offset does not exist.
        RuntimeError: the compiled kernels are not available or refuse the arguments.
    """
    op = "low_rank_linear"
    updates = _gated(x, updates)
    native.require_cpu(op, *(t for t in (x, weight, bias, output_scale, *updates[:-1]) if t is not None))
    bias, output_scale = (None if t is None else t.contiguous() for t in (bias, output_scale))
    odd = x.dtype == torch.bfloat16 and x.stride(1) % 2  # numbers are read in pairs
    if odd or x.stride(2) != 1 or x.stride(0) != x.shape[1] * x.stride(1):
        x = x.contiguous().view(-1).view(x.shape)  # whose strides are odd no more where a size is 1
    weight = _rows_contiguous(weight)
    y = torch.empty(*x.shape[:2], weight.shape[0], dtype=x.dtype)
    read = _readable(updates, torch.float32)
    status = native.extension().low_rank_linear(
        native.describe(x),
        native.describe(weight),
        native.describe_optional(bias),
        native.describe_optional(output_scale),
        tuple(native.describe_optional(tensor) for tensor in read),
        native.describe(y),
        instruction_set=native.instruction_set(op, None),
        threads=native.threads()[0],
    )
    _raise_for(op, status, updates, "linear")
    return y


def low_rank_update(
    base: Tensor,  # [B, N, O]
    x: Tensor | None,  # [B, N, K]
    updates: Updates,
    *,
    instruction_set: str | None = None,
) -> Tensor:  # [B, N, O]
    """Adds each row's updates to its base, on the CPU and without autograd.

    Sums in float32 (float64 where base is float64) and rounds once. A row's bits depend on that row alone, not on its
    neighbours and not on the number of threads.

    Args:
        base: [B, N, O] float32, float64, float16 or bfloat16.
        x: [B, N, K], base's dtype; None where the coefficients are given.
        updates: of any of these dtypes; gates are not read: their coefficients must be given.
        instruction_set: one of `instruction_sets()`; by default the last.

    Returns:
        [B, N, O], contiguous, of base's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.
        RuntimeError: the compiled kernels are not available.
    """
    return _updated(base, x, updates, None, instruction_set)


def _updated(
    base: Tensor, x: Tensor | None, updates: Updates, y: Tensor | None, instruction_set: str | None
) -> Tensor:  # [B, N, O]
    """`low_rank_update` into `y`, which may be the base itself; None: into new memory."""
    op = "low_rank_update"
    cpu, floating = torch.device("cpu"), native.floating_types()
    check_like(op, "base", base, floating, ("B", "N", "O"), cpu)
    if x is not None:
        check_like(op, "x", x, (base.dtype,), (*base.shape[:2], "K"), cpu)
        x = _rows_contiguous(x)
        updates = _gated(x, updates)
    native.require_cpu(op, *(t for t in updates[:-1] if t is not None))
    base = _rows_contiguous(base)
    y = torch.empty(base.shape, dtype=base.dtype) if y is None else y
    read = _readable(updates, accumulate_dtype(base.dtype))
    status = native.extension().low_rank_update(
        native.describe(base),
        native.describe_optional(x if updates.coefficients is None else None),
        tuple(native.describe_optional(tensor) for tensor in read),
        native.describe(y),
        instruction_set=native.instruction_set(op, instruction_set),
        threads=native.threads()[0],
    )
    _raise_for(op, status, updates, "update")
    return y


def low_rank_backward(
    grad: Tensor,  # [B, N, O]
    up: Tensor,  # [P, O]
    rows: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, N, R]
    need_up: bool = True,
    need_coefficients: bool = True,
    *,
    instruction_set: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # [P, O], [B, N, R]
    """The gradients of up and of the coefficients, from one pass over y's: made for few updates a row.

    grad_up[p] = sum of coefficients[b, n, r] * grad[b, n] over rows[b, r] = p
    grad_coefficients[b, n, r] = grad[b, n] . up[rows[b, r]], zero where there is no row

    Args:
        grad: [B, N, O], the gradient of y, any dtype of `low_rank_update`.
        up: [P, O], any of these dtypes.
        rows: [B, R] int32, which row of up each update takes; -1 for none.
        coefficients: [B, N, R], any of these dtypes.
        need_up, need_coefficients: which of the two are computed.
        instruction_set: as in `low_rank_update`.

    Returns:
        (grad_up [P, O], grad_coefficients [B, N, R]), float32 (float64 for a float64 grad); None where not needed.

    Raises:
        TypeError, ValueError, RuntimeError: as in `low_rank_update`.
    """
    op = "low_rank_backward"
    cpu, floating = torch.device("cpu"), native.floating_types()
    check_like(op, "grad", grad, floating, ("B", "N", "O"), cpu)
    check_like(op, "up", up, floating, ("P", grad.shape[2]), cpu)
    check_like(op, "rows", rows, (torch.int32,), (grad.shape[0], "R"), cpu)
    check_like(op, "coefficients", coefficients, floating, (*grad.shape[:2], rows.shape[1]), cpu)
    dtype = accumulate_dtype(grad.dtype)
    grad, up, coefficients = _rows_contiguous(grad), _rows_contiguous(up), coefficients.to(dtype)
    grad_up = torch.empty(up.shape, dtype=dtype) if need_up else None
    grad_c = torch.empty(coefficients.shape, dtype=dtype) if need_coefficients else None
    status = native.extension().low_rank_backward(
        *(native.describe(tensor) for tensor in (grad, up, rows, coefficients)),
        native.describe_optional(grad_up),
        native.describe_optional(grad_c),
        instruction_set=native.instruction_set(op, instruction_set),
        threads=native.threads()[0],
    )
    native.raise_for(op, status)
    return grad_up, grad_c


def _gated(x: Tensor, updates: Updates) -> Updates:
    """With coefficients in the place of gates, which the kernels do not know."""
    if updates.beta is None:
        return updates
    with exact_products(x.device):
        c = reference.coefficients(x, updates.checked("linear"), updates.slots, None)
    return updates._replace(down=None, beta=None, tau=None, strength=None, token_weights=None, coefficients=c)


def _readable(updates: Updates, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """As the kernels read them: tables as they are, what is small in `dtype`."""
    down = None if updates.down is None or updates.coefficients is not None else _rows_contiguous(updates.down)
    offsets = None if updates.offsets is None else updates.offsets.contiguous()
    small = (updates.strength, updates.token_weights, updates.coefficients)
    return (
        _rows_contiguous(updates.up),
        down,
        offsets,
        updates.slots,
        *(None if t is None else t.to(dtype) for t in small),
    )


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _raise_for(op: str, status: Any, updates: Updates, name: str) -> None:
    if status.name in ("slot_out_of_range", "offset_out_of_range"):
        updates.checked(name)  # which says what is wrong
    native.raise_for(op, status)
