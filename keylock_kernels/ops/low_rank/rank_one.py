"""Gated rank-one updates: validation, backend, one op call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backend as backends
from ..checks import check_like, check_tensor, dtype_name, side_dtypes
from ..precision import autocast_inputs
from . import op
from .updates import Updates


def rank_one_linear(
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    u: Tensor,  # [S, O]
    v: Tensor | None,  # [S, K]
    slots: Tensor,  # [B, R]
    *,
    bias: Tensor | None = None,  # [O]
    beta: Tensor | None = None,  # [S] or [B, R]
    tau: Tensor | None = None,  # [S] or [B, R]
    strength: Tensor | None = None,  # [B, R]
    coefficients: Tensor | None = None,  # [B, T, R]
    backend: str = "auto",
) -> Tensor:  # [B, T, O]
    """A linear layer in which every batch row takes its own gated rank-one updates.

    ::

        y[b, t] = weight x[b, t] + bias + sum_r c[b, t, r] u[slots[b, r]]
        s = x[b, t] . v[slots[b, r]]
        c = strength[b, r] * (s if tau == 0 else sigmoid((s - beta) / tau))

    Args:
        x: activations, float16, bfloat16, float32 or float64 [B, T, K].
        weight: the layer's own weight, shared by all rows, x's dtype [O, K].
        u: output vector of each update, x's dtype or float32 [S, O].
        v: input direction of each update, x's dtype or float32 [S, K]; None with ``coefficients``.
        slots: the updates a row takes, int32 [B, R]; -1 is exactly nothing, duplicates add.
        bias: x's dtype or float32 [O].
        beta: where a gate is half open, in units of s; x's dtype or float32, [S] or [B, R].
        tau: a gate's width, in units of s; given with beta or not at all. Exactly 0 means linear.
        strength: factor on each update, x's dtype or float32 [B, R].
        coefficients: c itself, x's dtype or float32 [B, T, R], instead of v, beta, tau and strength.
        backend: "auto", "eager", "native", "triton" or "cuda".

    Returns:
        y [B, T, O] in x's dtype, accumulated in float32 (float64 for float64) and rounded once.
        Under autocast x, weight and bias are cast as a linear layer's are.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a dtype, shape, device or combination does not fit, the backend cannot run, or
            (CPU only) a slot lies outside [-1, S). On a GPU such a slot makes its row NaN.
        RuntimeError: a CUDA graph is being captured, and Triton has no kernel for such arguments yet: call the op
            once before, with the same arguments and wanted gradients (docs/performance.md, "Captured graphs").

    Paper: Tewel et al., Key-Locked Rank One Editing for Text-to-Image Personalization, SIGGRAPH
    2023, arXiv 2305.01644.

    Example:
        >>> import torch
        >>> from keylock_kernels import rank_one_linear
        >>> x, weight = torch.randn(2, 77, 768), torch.randn(320, 768)
        >>> u, v = torch.randn(5, 320), torch.randn(5, 768)
        >>> slots = torch.tensor([[3], [-1]], dtype=torch.int32)  # row 0 takes update 3, row 1 none
        >>> rank_one_linear(x, weight, u, v, slots, beta=torch.full((5,), 0.7), tau=torch.full((5,), 0.1)).shape
        torch.Size([2, 77, 320])
    """
    name = "rank_one_linear"
    x, weight, bias = autocast_inputs(x, weight, bias)
    check_tensor(name, "x", x, dims=3, like="[B, T, K]")
    rows, tokens, inner = x.shape
    sides = side_dtypes(x.dtype)
    check_like(name, "weight", weight, (x.dtype,), ("O", inner), x.device)
    outer = weight.shape[0]
    if bias is not None:
        check_like(name, "bias", bias, sides, (outer,), x.device)
    check_like(name, "u", u, sides, ("S", outer), x.device)
    check_like(name, "slots", slots, (torch.int32,), (rows, "R"), x.device)
    if coefficients is None:
        if v is None:
            raise ValueError(f"{name}: v is missing; give v, or coefficients instead of it")
        _check_gate(name, x, v, u.shape[0], slots, beta, tau, strength)
    else:
        others = {"v": v, "beta": beta, "tau": tau, "strength": strength}
        given = ", ".join(label for label, tensor in others.items() if tensor is not None)
        if given:
            raise ValueError(f"{name}: coefficients stand instead of v, beta, tau and strength, got {given} too")
        check_like(name, "coefficients", coefficients, sides, (rows, tokens, slots.shape[1]), x.device)
    updates = Updates(u, v, None, slots, beta, tau, strength, None, coefficients, 1)
    return op.linear(x, weight, bias, None, updates, backends.choose(name, backend, x.device, x.dtype))


def rank_one_coefficients(
    x: Tensor,  # [B, T, K]
    v: Tensor,  # [S, K]
    slots: Tensor,  # [B, R]
    *,
    beta: Tensor | None = None,  # [S] or [B, R]
    tau: Tensor | None = None,  # [S] or [B, R]
    strength: Tensor | None = None,  # [B, R]
) -> Tensor:  # [B, T, R]
    """The coefficients of gated rank-one updates, which depend on the text and the concept only.

    ::

        s = x[b, t] . v[slots[b, r]]
        c[b, t, r] = strength[b, r] * (s if tau == 0 else sigmoid((s - beta) / tau))

    Computed once per prompt, they serve every layer that shares the text. Never autocast.

    Args:
        x: text encodings, float16, bfloat16, float32 or float64 [B, T, K].
        v: input direction of each update, x's dtype or float32 [S, K].
        slots: the updates a row takes, int32 [B, R]; -1 gives exactly 0.
        beta: where a gate is half open, in units of s; x's dtype or float32, [S] or [B, R].
        tau: a gate's width, in units of s; given with beta or not at all. Exactly 0 means linear.
        strength: factor on each update, x's dtype or float32 [B, R].

    Returns:
        c [B, T, R], float32 (float64 for float64 x).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a dtype, shape, device or combination does not fit, or (CPU only) a slot lies
            outside [-1, S). On a GPU the coefficient of such a slot is NaN.

    Paper: arXiv 2305.01644.

    Example:
        >>> import torch
        >>> from keylock_kernels import rank_one_coefficients
        >>> slots = torch.tensor([[0, -1]], dtype=torch.int32)
        >>> rank_one_coefficients(torch.ones(1, 1, 4), torch.ones(1, 4), slots)
        tensor([[[4., 0.]]])
    """
    name = "rank_one_coefficients"
    check_tensor(name, "x", x, dims=3, like="[B, T, K]")
    check_like(name, "slots", slots, (torch.int32,), (x.shape[0], "R"), x.device)
    _check_gate(name, x, v, "S", slots, beta, tau, strength)
    return op.rank_one_coefficients(x, v, slots, beta, tau, strength)


def rank_one_update(
    base: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
    *,
    backend: str = "auto",
) -> Tensor:  # [B, T, O]
    """Add each row's rank-one updates to what a linear layer has already computed.

    ::

        y[b, t] = base[b, t] + sum_r coefficients[b, t, r] u[slots[b, r]]

    For layers whose weight cannot be read as a plain matrix (adapters, quantised or offloaded
    weights). Out of place: base is not written.

    Args:
        base: the layer's output, float16, bfloat16, float32 or float64 [B, T, O].
        u: output vector of each update, base's dtype or float32 [S, O].
        slots: the updates a row takes, int32 [B, R]; -1 is exactly nothing, duplicates add.
        coefficients: base's dtype or float32 [B, T, R].
        backend: "auto", "eager", "native", "triton" or "cuda".

    Returns:
        y [B, T, O] in base's dtype, accumulated in float32 (float64 for float64), rounded once.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a dtype, shape or device does not fit, the backend cannot run, or (CPU only) a
            slot lies outside [-1, S). On a GPU such a slot makes its row NaN.
        RuntimeError: a CUDA graph is being captured, and Triton has no kernel for such arguments yet: call the op
            once before, with the same arguments and wanted gradients (docs/performance.md, "Captured graphs").

    Paper: arXiv 2305.01644.

    Example:
        >>> import torch
        >>> from keylock_kernels import rank_one_update
        >>> slots = torch.zeros(1, 1, dtype=torch.int32)
        >>> rank_one_update(torch.zeros(1, 1, 2), torch.ones(1, 2), slots, torch.full((1, 1, 1), 0.5))
        tensor([[[0.5000, 0.5000]]])
    """
    name = "rank_one_update"
    check_tensor(name, "base", base, dims=3, like="[B, T, O]")
    sides = side_dtypes(base.dtype)
    check_like(name, "u", u, sides, ("S", base.shape[2]), base.device)
    check_like(name, "slots", slots, (torch.int32,), (base.shape[0], "R"), base.device)
    check_like(name, "coefficients", coefficients, sides, (*base.shape[:2], slots.shape[1]), base.device)
    updates = Updates(u, None, None, slots, None, None, None, None, coefficients, 1)
    return op.update(base, None, updates, backends.choose(name, backend, base.device, base.dtype))


def _check_gate(
    name: str,
    x: Tensor,  # [B, T, K]
    v: Tensor,  # [S, K]
    count: Any,
    slots: Tensor,  # [B, R]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
) -> None:
    sides = side_dtypes(x.dtype)
    check_like(name, "v", v, sides, (count, x.shape[2]), x.device)
    if (beta is None) != (tau is None):
        only = "tau" if beta is None else "beta"
        raise ValueError(f"{name}: beta and tau are given together or not at all, got only {only}")
    for label, table in (("beta", beta), ("tau", tau)):
        if table is None:
            continue
        if isinstance(table, Tensor) and table.dim() not in (1, 2):
            raise ValueError(
                f"{name}: {label} must be [{v.shape[0]}] or {list(slots.shape)}, "
                f"got {dtype_name(table.dtype)} {list(table.shape)}"
            )
        shape = (v.shape[0],) if isinstance(table, Tensor) and table.dim() == 1 else tuple(slots.shape)
        check_like(name, label, table, sides, shape, x.device)
    if strength is not None:
        check_like(name, "strength", strength, sides, tuple(slots.shape), x.device)
