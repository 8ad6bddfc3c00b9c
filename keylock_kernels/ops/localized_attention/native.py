"""Calls of the C++ kernels of csrc/cpu/: memory for the results, one call. The kernels check the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import native
from ..precision import accumulate_dtype

_NAME = "localized_attention"
_WEIGHTS = 11, 7  # where image_weights stand among the inputs, and among the differentiable ones


def forward(*inputs: Any, instruction_set: str | None = None) -> tuple[Tensor, Tensor]:
    """The op's forward pass on the CPU: out [B, N, H, D], and columns [B, H, N, M] or sums [B, H, M].

    Args:
        inputs: as in the op's schema, without the backend.
        instruction_set: one of `native.instruction_sets()`; by default the last.
    """
    query, readout_tokens, readout_weights = inputs[0], inputs[12], inputs[13]
    rows, pixels, heads, _ = query.shape
    dtype = accumulate_dtype(query.dtype)
    out = torch.empty(query.shape, dtype=query.dtype)
    if readout_tokens is None:
        readout, described = torch.empty(rows, heads, 0, dtype=dtype), None
    elif readout_weights is None:
        readout = torch.empty(rows, heads, pixels, readout_tokens.shape[1], dtype=dtype)
        described = native.describe(readout)
    else:
        readout = torch.empty(rows, heads, readout_tokens.shape[1], dtype=dtype)
        described = native.describe(readout[:, :, None])
    status = native.extension().localized_attention(
        _inputs(*inputs),
        native.describe(out),
        described,
        instruction_set=native.instruction_set(_NAME, instruction_set),
        threads=native.threads()[0],
    )
    native.raise_for(_NAME, status)
    return out, readout


def backward(
    grad_out: Tensor | None,  # [B, N, H, D]
    grad_readout: Tensor | None,  # [B, H, N, M] or [B, H, M]
    *inputs: Any,
    differentiable: Sequence[Tensor | None],
    needs: Sequence[bool],
    instruction_set: str | None = None,
) -> list[Tensor]:
    """The gradients that `needs` asks for of the `differentiable` inputs, in the order of the op's schema."""
    if grad_out is not None and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if inputs[12] is None:
        grad_readout = None
    elif grad_readout is not None and inputs[13] is not None:
        grad_readout = grad_readout[:, :, None]
    at, among = _WEIGHTS
    weights = inputs[at]
    if weights is not None and weights.dim() == 3:  # a stride of 0 would mean one weight for all pixels
        inputs = (*inputs[:at], weights.contiguous(), *inputs[at + 1 :])
    grads = [
        torch.empty(tensor.shape, dtype=tensor.dtype) if need and tensor is not None else None
        for tensor, need in zip(differentiable, needs, strict=True)
    ]
    described = [None if grad is None else native.describe(grad) for grad in grads]
    grad_weights = grads[among]
    if grad_weights is not None and grad_weights.dim() == 2:
        described[among] = native.describe(grad_weights[..., None])
    status = native.extension().localized_attention_backward(
        _inputs(*inputs),
        *(None if grad is None else native.describe(grad) for grad in (grad_out, grad_readout)),
        tuple(described),
        instruction_set=native.instruction_set(_NAME, instruction_set),
        threads=native.threads()[0],
    )
    native.raise_for(_NAME, status)
    return [grad for grad in grads if grad is not None]


def _inputs(*inputs: Any) -> tuple[Any, ...]:
    """What csrc/bindings.cpp takes for the op's inputs, in the order of its schema."""
    described: list[Any] = []
    for value in inputs:
        if isinstance(value, Tensor):
            native.require_cpu(_NAME, value)
            value = native.describe(value)
        described.append(value)
    at, _ = _WEIGHTS
    weights = inputs[at]
    if weights is not None and weights.dim() == 2:
        described[at] = native.describe(weights[..., None].expand(-1, -1, inputs[0].shape[1]))
    described[9] = [int(length) for length in inputs[9]]
    return tuple(described)
