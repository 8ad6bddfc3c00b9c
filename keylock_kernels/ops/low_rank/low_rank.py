"""Low-rank adapters: validation, backend, one op call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backend as backends
from ..checks import check_like, check_tensor, side_dtypes
from ..precision import autocast_inputs
from . import op
from .updates import Updates


def low_rank_linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    up: Tensor,  # [P, O]
    down: Tensor,  # [P, K]
    offsets: Tensor,  # [S + 1]
    slots: Tensor,  # [B, J]
    *,
    bias: Tensor | None = None,  # [O]
    strength: Tensor | None = None,  # [B, J]
    token_weights: Tensor | None = None,  # [B, J, N]
    output_scale: Tensor | None = None,  # [B, O]
    max_rank: int | None = None,
    backend: str = "auto",
) -> Tensor:  # [B, N, O]
    """A linear layer in which every batch row carries its own low-rank adapters, each where its weights say.

    ::

        y[b, n] = output_scale[b] * (weight x[b, n] + sum_j w[b, j, n] B_k (A_k x[b, n])) + bias
        w[b, j, n] = strength[b, j] * token_weights[b, j, n],   k = slots[b, j]

    The adapters lie in two tables, one after the other: A_k is the rows ``offsets[k] : offsets[k + 1]`` of ``down``,
    and B_k the same rows of ``up``, transposed. Their ranks may differ. Nothing of weight + B A is ever made.

    Args:
        x: activations, float16, bfloat16, float32 or float64 [B, N, K].
        weight: the layer's own weight, shared by all rows, x's dtype [O, K].
        up: the columns of every B, x's dtype or float32 [P, O].
        down: the rows of every A, x's dtype or float32 [P, K].
        offsets: where each adapter's rows begin, and where the last one's end; int32 [S + 1], not decreasing.
        slots: the adapters a row carries, int32 [B, J]; -1 is exactly nothing, duplicates add.
        bias: x's dtype or float32 [O].
        strength: factor on each adapter, alpha / rank included; x's dtype or float32 [B, J]. 0 is exactly nothing.
        token_weights: where an adapter counts, x's dtype or float32 [B, J, N]; absent: everywhere, by 1. 0 is exactly
            nothing, even beside what is not finite.
        output_scale: factor on each output before the bias, as weight-decomposed adapters (DoRA) have it; x's dtype
            or float32 [B, O].
        max_rank: no adapter that a row carries has more rows than this. Only a GPU needs to be told, where looking
            would stall it: its gradients take memory for so many rows a slot. Default there: P.
        backend: "auto", "eager", "bmm", "native", "triton" or "cuda".

    Returns:
        y [B, N, O] in x's dtype, accumulated in float32 (float64 for float64) and rounded once.
        Under autocast x, weight and bias are cast as a linear layer's are.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a dtype, shape, device or combination does not fit, the backend cannot run, or (CPU only) a slot
            lies outside [-1, S), offsets decrease or reach beyond P, or one of these has more rows than ``max_rank``.
            On a GPU these make their row NaN.
        RuntimeError: a CUDA graph is being captured, and Triton has no kernel for such arguments yet: call the op
            once before, with the same arguments and wanted gradients (docs/performance.md, "Captured graphs").

    Papers: Hu et al., LoRA, arXiv 2106.09685; Liu et al., DoRA, arXiv 2402.09353.

    Example:
        >>> import torch
        >>> from keylock_kernels import low_rank_linear
        >>> x, weight = torch.randn(3, 64, 320), torch.randn(640, 320)
        >>> down, up = torch.randn(12, 320), torch.randn(12, 640)  # an adapter of rank 8 and one of rank 4
        >>> offsets = torch.tensor([0, 8, 12], dtype=torch.int32)
        >>> slots = torch.tensor([[0, -1], [1, 0], [-1, -1]], dtype=torch.int32)  # one, two stacked, none
        >>> low_rank_linear(x, weight, up, down, offsets, slots).shape
        torch.Size([3, 64, 640])
    """
    name = "low_rank_linear"
    x, weight, bias = autocast_inputs(x, weight, bias)
    check_tensor(name, "x", x, dims=3, like="[B, N, K]")
    rows, _, inner = x.shape
    sides = side_dtypes(x.dtype)
    check_like(name, "weight", weight, (x.dtype,), ("O", inner), x.device)
    outer = weight.shape[0]
    if bias is not None:
        check_like(name, "bias", bias, sides, (outer,), x.device)
    if output_scale is not None:
        check_like(name, "output_scale", output_scale, sides, (rows, outer), x.device)
    updates = _updates(name, x, outer, up, down, offsets, slots, strength, token_weights, max_rank)
    return op.linear(x, weight, bias, output_scale, updates, backends.choose(name, backend, x.device, x.dtype))


def low_rank_update(
    base: Tensor,  # [B, N, O]
    x: Tensor,  # [B, N, K]
    up: Tensor,  # [P, O]
    down: Tensor,  # [P, K]
    offsets: Tensor,  # [S + 1]
    slots: Tensor,  # [B, J]
    *,
    strength: Tensor | None = None,  # [B, J]
    token_weights: Tensor | None = None,  # [B, J, N]
    max_rank: int | None = None,
    backend: str = "auto",
) -> Tensor:  # [B, N, O]
    """Add each row's low-rank adapters to what a layer has already computed.

    ::

        y[b, n] = base[b, n] + sum_j strength[b, j] * token_weights[b, j, n] * B_k (A_k x[b, n]),   k = slots[b, j]

    For layers that must be called as modules (other adapters, quantised or offloaded weights, convolutions). Out of
    place: base is not written.

    Args:
        base: the layer's output, float16, bfloat16, float32 or float64 [B, N, O].
        x: the layer's input, base's dtype [B, N, K].
        up, down, offsets, slots, strength, token_weights, max_rank: as in `low_rank_linear`.
        backend: "auto", "eager", "native", "triton" or "cuda".

    Returns:
        y [B, N, O] in base's dtype, accumulated in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError, RuntimeError: as in `low_rank_linear`.

    Paper: Hu et al., LoRA, arXiv 2106.09685.

    Example:
        >>> import torch
        >>> from keylock_kernels import low_rank_update
        >>> one, offsets = torch.ones(1, 2), torch.tensor([0, 1], dtype=torch.int32)
        >>> slots = torch.zeros(1, 1, dtype=torch.int32)
        >>> low_rank_update(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), one, one, offsets, slots)
        tensor([[[2., 2.]]])
    """
    name = "low_rank_update"
    check_tensor(name, "base", base, dims=3, like="[B, N, O]")
    check_like(name, "x", x, (base.dtype,), (*base.shape[:2], "K"), base.device)
    updates = _updates(name, x, base.shape[2], up, down, offsets, slots, strength, token_weights, max_rank)
    return op.update(base, x, updates, backends.choose(name, backend, base.device, base.dtype))


def _updates(
    name: str,
    x: Tensor,  # [B, N, K]
    outer: int,
    up: Tensor,  # [P, O]
    down: Tensor,  # [P, K]
    offsets: Tensor,  # [S + 1]
    slots: Tensor,  # [B, J]
    strength: Tensor | None,  # [B, J]
    token_weights: Tensor | None,  # [B, J, N]
    max_rank: Any,
) -> Updates:
    sides = side_dtypes(x.dtype)
    check_like(name, "up", up, sides, ("P", outer), x.device)
    check_like(name, "down", down, sides, (up.shape[0], x.shape[2]), x.device)
    check_like(name, "offsets", offsets, (torch.int32,), ("S + 1",), x.device)
    if offsets.shape[0] == 0:
        raise ValueError(f"{name}: offsets must be int32 [S + 1], which is at least [0], got int32 [0]")
    check_like(name, "slots", slots, (torch.int32,), (x.shape[0], "J"), x.device)
    if strength is not None:
        check_like(name, "strength", strength, sides, tuple(slots.shape), x.device)
    if token_weights is not None:
        check_like(name, "token_weights", token_weights, sides, (*slots.shape, x.shape[1]), x.device)
    if max_rank is None:
        max_rank = up.shape[0]
    elif not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 0:
        raise ValueError(f"{name}: max_rank must be a number of rows, 0 or more, got {max_rank!r}")
    return Updates(up, down, offsets, slots, None, None, strength, token_weights, None, min(max_rank, up.shape[0]))
