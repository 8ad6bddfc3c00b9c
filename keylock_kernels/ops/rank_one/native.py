"""Calls of the C++ kernels of csrc/cpu/: checks, memory for the results, one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ..checks import check_like
from ..precision import accumulate_dtype


def multiplies(x: Tensor) -> bool:
    """Whether `rank_one_linear` has a product of its own for x [B, T, K] on this CPU."""
    best = native.instruction_set("rank_one_linear", None).name
    if x.dtype == torch.float32:
        return best.startswith("avx512")
    return x.dtype == torch.bfloat16 and x.shape[2] % 2 == 0 and best == "avx512_bf16"


def rank_one_linear(
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
) -> Tensor:  # [B, T, O]
    """The whole layer in one kernel, where `multiplies` says so: sums in float32, one rounding.

    Args:
        x: [B, T, K] float32, or bfloat16 with an even K.
        weight: [O, K], x's dtype.
        bias: [O] float32 or bfloat16.
        u: [S, O] float32 or bfloat16.
        slots: [B, R] int32, the row of u each update takes; -1 is none, exactly; duplicates add.
        coefficients: [B, T, R], any floating dtype.

    Returns:
        [B, T, O], contiguous, of x's dtype.

    Raises:
        ValueError: a tensor is not on the CPU, or a slot does not exist.
        RuntimeError: the compiled kernels are not available or refuse the arguments.
    """
    op = "rank_one_linear"
    given = (x, weight, u, slots, coefficients) if bias is None else (x, weight, u, slots, coefficients, bias)
    native.require_cpu(op, *given)
    bias = None if bias is None else bias.contiguous()
    if x.stride(2) != 1 or x.stride(1) % 2 or x.stride(0) != x.shape[1] * x.stride(1):
        x = x.contiguous().view(-1).view(x.shape)  # whose strides are odd no more where a size is 1
    coefficients = _wide(coefficients)
    weight, u = (t if t.stride(1) == 1 else t.contiguous() for t in (weight, u))
    y = torch.empty(*x.shape[:2], weight.shape[0], dtype=x.dtype)
    status = native.extension().rank_one_linear(
        native.describe(x),
        native.describe(weight),
        None if bias is None else native.describe(bias),
        *(native.describe(tensor) for tensor in (u, slots, coefficients, y)),
        instruction_set=native.instruction_set(op, None),
        threads=native.threads()[0],
    )
    _raise_for(op, status, u, slots)
    return y


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
    coefficients = _wide(coefficients)
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
    coefficients = _wide(coefficients)
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


def _wide(coefficients: Tensor) -> Tensor:  # [B, T, R]
    """As the kernels read them; they are few."""
    return coefficients if coefficients.dtype in (torch.float32, torch.float64) else coefficients.float()


def _raise_for(op: str, status: Any, u: Tensor, slots: Tensor) -> None:
    if status.name == "slot_out_of_range":
        wrong = slots[(slots < -1) | (slots >= u.shape[0])][0]
        raise ValueError(f"{op}: slots must lie in [-1, {u.shape[0]}), got {int(wrong)}")
    native.raise_for(op, status)
