"""Torch registration of localized attention: schemas, implementations, fakes, and autograd outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulate_dtype, exact_products
from ..recording import recorded, refuse_double_backward
from . import reference, sdpa

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, float scale, Tensor? key_bias, Tensor? query_regions,"
    " Tensor? key_regions, Tensor? image_key, Tensor? image_value, SymInt[] image_lengths,"
    " Tensor? image_key_bias, Tensor? image_weights, Tensor? readout_tokens, Tensor? readout_weights, str backend"
)
# The second result is empty where nothing is read out. The backward returns the gradients whose
# `needs` flag is set, of the floating-point tensors in the order above.
torch.library.define("keylock::localized_attention", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "keylock::localized_attention_backward",
    f"(Tensor? grad_out, Tensor? grad_readout, {_INPUTS}, bool[] needs) -> Tensor[]",
)
_forward_op = torch.ops.keylock.localized_attention.default
_backward_op = torch.ops.keylock.localized_attention_backward.default

_PARTS = {
    "eager": (reference.attention, reference.columns),
    "sdpa": (sdpa.attention, sdpa.read_columns),
}
# Where the floating-point tensors stand among the inputs.
_DIFFERENTIABLE = (0, 1, 2, 4, 7, 8, 10, 11, 13)


def _check_tokens(tokens: Tensor, count: int) -> None:
    """Raise for a read-out token that does not exist, on the CPU; elsewhere looking would stall the device."""
    if tokens.device.type != "cpu" or tokens.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(tokens))
    if low < -1 or high >= count:
        wrong = low if low < -1 else high
        raise ValueError(f"localized_attention: readout_tokens must lie in [-1, {count}), got {wrong}")


def _forward(
    query: Tensor,  # [B, N, H, D]
    key: Tensor,  # [B, T, H, D]
    value: Tensor,  # [B, T, H, D]
    scale: float,
    key_bias: Tensor | None,  # [B, T]
    query_regions: Tensor | None,  # [B, N]
    key_regions: Tensor | None,  # [B, T]
    image_key: Tensor | None,  # [B, sum(L), H, D]
    image_value: Tensor | None,  # [B, sum(L), H, D]
    image_lengths: list[int],
    image_key_bias: Tensor | None,  # [B, sum(L)]
    image_weights: Tensor | None,  # [B, I] or [B, I, N]
    readout_tokens: Tensor | None,  # [B, M]
    readout_weights: Tensor | None,  # [B, N, M]
    backend: str,
) -> tuple[Tensor, Tensor]:
    if readout_tokens is not None:
        keys = key.shape[1] + sum(image_lengths)
        _check_tokens(readout_tokens, keys)
    inputs = (
        query, key, value, scale, key_bias, query_regions, key_regions, image_key, image_value, image_lengths,
        image_key_bias, image_weights, readout_tokens, readout_weights,
    )  # fmt: skip
    if backend == "triton":
        from . import triton

        return triton.forward(*inputs)
    if backend == "cuda":
        from ... import native_cuda

        return native_cuda.localized_attention(*inputs)
    if backend == "native":
        from . import native

        return native.forward(*inputs)
    attend, read = _PARTS[backend]
    with torch.no_grad(), exact_products(query.device):
        text = reference.make_stream(key, value, key_bias, query_regions, key_regions)
        images = reference.image_streams(image_key, image_value, image_lengths, image_key_bias, key.shape[1])
        out = reference.combine(query, text, images, image_weights, scale, attend).contiguous()
        if readout_tokens is None:
            return out, query.new_empty(query.shape[0], query.shape[2], 0, dtype=accumulate_dtype(query.dtype))
        columns = reference.read_out(query, [text, *images], readout_tokens, readout_weights, scale, read)
        if readout_tokens.device.type != "cpu":
            missing = (readout_tokens < -1) | (readout_tokens >= keys)
            columns = columns.masked_fill(missing[:, None, None] if columns.dim() == 4 else missing[:, None], torch.nan)
        return out, columns.contiguous()


def _backward(
    grad_out: Tensor | None,  # [B, N, H, D]
    grad_readout: Tensor | None,  # [B, H, N, M] or [B, H, M]
    *arguments: Any,
) -> list[Tensor]:
    """The gradients; torch's backends run the forward again with autograd recording, a stream at a time."""
    inputs, needs = list(arguments[:-1]), arguments[-1]
    if inputs[-1] in ("triton", "cuda"):
        from . import triton

        return triton.backward(grad_out, grad_readout, *inputs[:-1], needs=needs)  # type: ignore[misc]
    if inputs[-1] == "native":
        from . import native

        differentiable = [inputs[position] for position in _DIFFERENTIABLE]
        return native.backward(grad_out, grad_readout, *inputs[:-1], differentiable=differentiable, needs=needs)
    leaves = []
    for position, need in zip(_DIFFERENTIABLE, needs, strict=True):
        if need:
            inputs[position] = inputs[position].detach().requires_grad_()
            leaves.append(inputs[position])
    query, key, value, scale, key_bias, query_regions, key_regions = inputs[:7]
    image_key, image_value, image_lengths, image_key_bias, image_weights = inputs[7:12]
    readout_tokens, readout_weights, backend = inputs[12:]
    attend, read = _PARTS[backend]
    results, grads = [], []
    with recorded(), exact_products(query.device):
        text = reference.make_stream(key, value, key_bias, query_regions, key_regions)
        images = reference.image_streams(image_key, image_value, image_lengths, image_key_bias, key.shape[1])
        if grad_out is not None:
            results.append(reference.combine(query, text, images, image_weights, scale, attend))
            grads.append(grad_out.contiguous())
        if grad_readout is not None and readout_tokens is not None:
            results.append(reference.read_out(query, [text, *images], readout_tokens, readout_weights, scale, read))
            grads.append(grad_readout.contiguous())
        reached = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
        if not reached:
            return [torch.zeros_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves]
        found = torch.autograd.grad(
            [r for r, _ in reached], leaves, [g for _, g in reached], allow_unused=True, materialize_grads=True
        )
    return [grad.contiguous() for grad in found]


torch.library.impl("keylock::localized_attention", "CompositeExplicitAutograd", _forward)
torch.library.impl("keylock::localized_attention_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("keylock::localized_attention")
def _(query, key, value, scale, key_bias, query_regions, key_regions, image_key, image_value, image_lengths,
      image_key_bias, image_weights, readout_tokens, readout_weights, backend):  # fmt: skip
    rows, pixels, heads, _ = query.shape
    read = 0 if readout_tokens is None else readout_tokens.shape[1]
    whole = readout_tokens is not None and readout_weights is None
    shape = (rows, heads, pixels, read) if whole else (rows, heads, read)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=accumulate_dtype(query.dtype))


@torch.library.register_fake("keylock::localized_attention_backward")
def _(grad_out, grad_readout, *arguments):
    needed = [p for p, need in zip(_DIFFERENTIABLE, arguments[-1], strict=True) if need]
    return [arguments[p].new_empty(arguments[p].shape) for p in needed]


class _LocalizedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.scale, ctx.image_lengths, ctx.backend = inputs[3], inputs[9], inputs[14]
        return _forward_op(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_readout: Tensor | None) -> Any:  # type: ignore[override]
        refuse_double_backward("localized_attention")
        inputs = list(ctx.saved_tensors)
        inputs[3], inputs[9], inputs[14] = ctx.scale, ctx.image_lengths, ctx.backend
        needs = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
        found = iter(_backward_op(grad_out, grad_readout, *inputs, needs))
        grads: list[Tensor | None] = [None] * len(inputs)
        for position, need in zip(_DIFFERENTIABLE, needs, strict=True):
            if need:
                grads[position] = next(found)
        return tuple(grads)


def localized_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The op with autograd around it; arguments as in its schema."""
    recording = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    return _LocalizedAttention.apply(*inputs) if recording else _forward_op(*inputs)
