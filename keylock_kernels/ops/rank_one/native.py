"""Calls of the C++ kernels of csrc/cpu/: checks, memory for the results, one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ..checks import check_like
from ..precision import accumulate_dtype


def rank_one_update(
    base: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
    *,
    instruction_set: str | None = None,
) -> Tensor:  # [B, T, O]
    """Adds each row's updates to its base, on the CPU and without autograd.

    y[b, t] = base[b, t] + sum_r coefficients[b, t, r] * u[slots[b, r]]

    Sums in float32 (float64 where base is float64) and rounds once. A row's bits depend on that
    row alone, not on its neighbours and not on the number of threads.

    Args:
        base: [B, T, O] float32, float64, float16 or bfloat16; last dimension contiguous.
        u: [S, O], any of these types; last dimension contiguous.
        slots: [B, R] int32, the row of u each update takes; -1 is none, exactly; duplicates add.
        coefficients: [B, T, R], any of these types.
        instruction_set: one of `instruction_sets()`; by default the last.

    Returns:
        [B, T, O], contiguous, of base's type.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, layout or range.
        RuntimeError: the compiled kernels are not available.
    """
    _check("rank_one_update", "base", base, u, slots, coefficients)
    if coefficients.dtype not in (torch.float32, torch.float64):
        coefficients = coefficients.float()  # the kernel reads no other; they are few
    y = torch.empty(base.shape, dtype=base.dtype)
    extension = native.extension()
    status = extension.rank_one_update(
        *(native.describe(tensor) for tensor in (base, u, slots, coefficients, y)),
        instruction_set=native.instruction_set("rank_one_update", instruction_set),
        threads=native.threads()[0],
    )
    _raise_for("rank_one_update", status, u, slots)
    return y


def rank_one_update_backward(
    grad: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
    need_u: bool = True,
    need_coefficients: bool = True,
    *,
    instruction_set: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # [S, O], [B, T, R]
    """The gradients of u and of the coefficients, from one pass over y's.

    grad_u[s] = sum of coefficients[b, t, r] * grad[b, t] over slots[b, r] = s
    grad_coefficients[b, t, r] = grad[b, t] . u[slots[b, r]], zero where there is no slot

    Args:
        grad: [B, T, O], the gradient of y, any dtype of `rank_one_update`; last dimension contiguous.
        u, slots, coefficients, instruction_set: as in `rank_one_update`.
        need_u, need_coefficients: which of the two are computed.

    Returns:
        (grad_u [S, O], grad_coefficients [B, T, R]), float32 (float64 for a float64 grad); None
        where not needed.

    Raises:
        TypeError, ValueError, RuntimeError: as in `rank_one_update`.
    """
    _check("rank_one_update_backward", "grad", grad, u, slots, coefficients)
    if coefficients.dtype not in (torch.float32, torch.float64):
        coefficients = coefficients.float()
    dtype = accumulate_dtype(grad.dtype)
    grad_u = torch.empty(u.shape, dtype=dtype) if need_u else None
    grad_c = torch.empty(coefficients.shape, dtype=dtype) if need_coefficients else None
    extension = native.extension()
    status = extension.rank_one_update_backward(
        *(native.describe(tensor) for tensor in (grad, u, slots, coefficients)),
        *(None if tensor is None else native.describe(tensor) for tensor in (grad_u, grad_c)),
        instruction_set=native.instruction_set("rank_one_update_backward", instruction_set),
        threads=native.threads()[0],
    )
    _raise_for("rank_one_update_backward", status, u, slots)
    return grad_u, grad_c


def _check(op: str, name: str, activations: Tensor, u: Tensor, slots: Tensor, coefficients: Tensor) -> None:
    """`activations`, called `name`, are [B, T, O]; the rest as in `rank_one_update`."""
    cpu, floating = torch.device("cpu"), native.floating_types()
    check_like(op, name, activations, floating, ("B", "T", "O"), cpu)
    check_like(op, "u", u, floating, ("S", activations.shape[2]), cpu)
    check_like(op, "slots", slots, (torch.int32,), (activations.shape[0], "R"), cpu)
    check_like(op, "coefficients", coefficients, floating, (*activations.shape[:2], slots.shape[1]), cpu)
    for label, tensor in ((name, activations), ("u", u)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            strides = list(tensor.stride())
            raise ValueError(f"{op}: {label} must have a contiguous last dimension, got strides {strides}")


def _raise_for(op: str, status: Any, u: Tensor, slots: Tensor) -> None:
    if status.name == "slot_out_of_range":
        wrong = slots[(slots < -1) | (slots >= u.shape[0])][0]
        raise ValueError(f"{op}: slots must lie in [-1, {u.shape[0]}), got {int(wrong)}")
    native.raise_for(op, status)
