"""Torch registration of low-rank updates: schemas, implementations, fakes, and autograd outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulate_dtype, exact_products
from ..recording import refuse_double_backward
from . import composed, reference
from .updates import Updates

_UPDATES = (
    "Tensor up, Tensor? down, Tensor? offsets, Tensor slots, Tensor? beta, Tensor? tau, Tensor? strength,"
    " Tensor? token_weights, Tensor? coefficients"
)
_LAYER = "Tensor x, Tensor weight, Tensor? bias, Tensor? output_scale"
_COEFFICIENTS = "Tensor x, Tensor v, Tensor slots, Tensor? beta, Tensor? tau, Tensor? strength"

# A backward returns the gradients whose `needs` flag is set, in the order of the tensors above.
torch.library.define("keylock::low_rank_linear", f"({_LAYER}, {_UPDATES}, SymInt max_rank, str backend) -> Tensor")
torch.library.define(
    "keylock::low_rank_linear_backward",
    f"(Tensor grad, {_LAYER}, {_UPDATES}, SymInt max_rank, str backend, bool[] needs) -> Tensor[]",
)
torch.library.define(
    "keylock::low_rank_update", f"(Tensor base, Tensor? x, {_UPDATES}, SymInt max_rank, str backend) -> Tensor"
)
torch.library.define(
    "keylock::low_rank_update_backward",
    f"(Tensor grad, Tensor? x, {_UPDATES}, SymInt max_rank, str backend, bool[] needs) -> Tensor[]",
)
torch.library.define("keylock::rank_one_coefficients", f"({_COEFFICIENTS}) -> Tensor")
torch.library.define(
    "keylock::rank_one_coefficients_backward", f"(Tensor grad, {_COEFFICIENTS}, bool[] needs) -> Tensor[]"
)

_linear_op = torch.ops.keylock.low_rank_linear.default
_linear_backward_op = torch.ops.keylock.low_rank_linear_backward.default
_update_op = torch.ops.keylock.low_rank_update.default
_update_backward_op = torch.ops.keylock.low_rank_update_backward.default
_coefficients_op = torch.ops.keylock.rank_one_coefficients.default
_coefficients_backward_op = torch.ops.keylock.rank_one_coefficients_backward.default


def _chosen(needs: list[bool], names: tuple[str, ...], inputs: Any, found: dict[str, Tensor]) -> list[Tensor]:
    """The gradients that were asked for, each in its input's dtype and in memory of its own."""
    kept = []
    for need, name, tensor in zip(needs, names, inputs, strict=True):
        if need and tensor is not None:
            grad = found.get(name)
            kept.append(torch.zeros_like(tensor) if grad is None else grad.to(tensor.dtype).contiguous())
    return kept


def _fake_grads(needs: list[bool], inputs: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for need, t in zip(needs, inputs, strict=True) if need and t is not None]


_OF_UPDATES = Updates._fields[:-1]
_OF_LAYER = ("x", "weight", "bias", "output_scale", *_OF_UPDATES)
_OF_UPDATE = ("x", *_OF_UPDATES)


def _linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    *rest: Any,  # the updates, and the backend
) -> Tensor:  # [B, N, O]
    updates, backend = Updates(*rest[:-1]), rest[-1]
    if backend == "native":  # which looks at slots and offsets itself
        from . import native

        return native.linear(x, weight, bias, output_scale, updates)
    updates = updates.checked("linear")
    if backend == "triton":
        from . import triton

        return triton.linear(x, weight, bias, output_scale, updates)
    if backend == "cuda":
        from ... import native_cuda

        return native_cuda.low_rank_linear(x, weight, bias, output_scale, updates)
    with exact_products(x.device):
        if backend == "bmm":
            return composed.linear(x, weight, bias, output_scale, updates)
        return reference.linear(x, weight, bias, output_scale, updates).contiguous()


def _linear_backward(
    grad: Tensor,  # [B, N, O]
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    *rest: Any,  # the updates, the backend, and what is needed
) -> list[Tensor]:
    updates, backend, needs = Updates(*rest[:-2]).checked("linear"), rest[-2], rest[-1]
    needed = dict(zip(_OF_LAYER, needs, strict=True))
    dtype = accumulate_dtype(x.dtype)
    found: dict[str, Tensor] = {}
    with exact_products(x.device):
        wide = grad.to(dtype)
        if needed["bias"]:
            found["bias"] = wide.sum((0, 1))
        if needed["output_scale"]:
            unscaled = reference.unscaled(x, weight, updates)
            found["output_scale"] = (wide * unscaled).sum(1)
        if output_scale is not None:
            wide = wide * output_scale.to(dtype)[:, None]
            grad = wide.to(grad.dtype) if backend in ("triton", "cuda") else grad
        if needed["weight"]:
            found["weight"] = wide.flatten(0, 1).mT @ x.to(dtype).flatten(0, 1)
        if backend in ("triton", "cuda"):
            from . import triton

            found |= triton.linear_backward(grad, x, weight, updates, needed)
        else:
            found |= _updates_backward(wide, x, updates, backend, needed)
            if needed["x"]:
                through = found.get("x")
                straight = reference.row_matmul(wide, weight.to(dtype))
                found["x"] = straight if through is None else straight + through
    return _chosen(needs, _OF_LAYER, (x, weight, bias, output_scale, *updates[:-1]), found)


def _updates_backward(
    grad: Tensor,  # [B, N, O], in the accumulation dtype
    x: Tensor | None,  # [B, N, K]
    updates: Updates,
    backend: str,
    needed: dict[str, bool],
) -> dict[str, Tensor]:
    """The gradients of the updates' tensors, and of x through them, in the accumulation dtype."""
    rows, owner = reference.table_rows(updates)
    c = reference.coefficients(x, updates, rows, owner)
    given = updates.coefficients is not None
    need_c = any(needed[name] for name in ("x", "down", "beta", "tau", "strength", "token_weights", "coefficients"))
    added_backward = reference.added_backward
    if backend == "native":
        from . import native

        added_backward = native.added_backward
    found = {}
    up, dc = added_backward(grad, updates.up, rows, c.to(grad.dtype), needed["up"], need_c)
    if up is not None:
        found["up"] = up
    if dc is not None and given:
        found["coefficients"] = dc
    elif dc is not None:
        assert x is not None
        found |= reference.coefficients_backward(dc, x, updates, rows, owner, needed["x"])
    return found


def _update(
    base: Tensor,  # [B, N, O]
    x: Tensor | None,  # [B, N, K]
    *rest: Any,  # the updates, and the backend
) -> Tensor:  # [B, N, O]
    updates, backend = Updates(*rest[:-1]), rest[-1]
    if backend == "native":  # which looks at slots and offsets itself
        from . import native

        return native.update(base, x, updates)
    updates = updates.checked("update")
    if backend == "triton":
        from . import triton

        return triton.update(base, x, updates)
    if backend == "cuda":
        from ... import native_cuda

        return native_cuda.low_rank_update(base, x, updates)
    with exact_products(base.device):
        return reference.update(base, x, updates).contiguous()


def _update_backward(
    grad: Tensor,  # [B, N, O]
    x: Tensor | None,  # [B, N, K]
    *rest: Any,  # the updates, the backend, and what is needed
) -> list[Tensor]:
    updates, backend, needs = Updates(*rest[:-2]).checked("update"), rest[-2], rest[-1]
    needed = dict(zip(_OF_UPDATE, needs, strict=True))
    with exact_products(grad.device):
        if backend in ("triton", "cuda"):
            from . import triton

            found = triton.update_backward(grad, x, updates, needed)
        else:
            found = _updates_backward(grad.to(accumulate_dtype(grad.dtype)), x, updates, backend, needed)
    return _chosen(needs, _OF_UPDATE, (x, *updates[:-1]), found)


def _coefficients_of(x: Tensor, v: Tensor, slots: Tensor, *gate: Tensor | None) -> Updates:
    beta, tau, strength = gate
    return Updates(v, v, None, slots, beta, tau, strength, None, None, 1)


def _coefficients(x: Tensor, v: Tensor, slots: Tensor, *gate: Tensor | None) -> Tensor:  # [B, T, R]
    updates = _coefficients_of(x, v, slots, *gate).checked("coefficients")
    with exact_products(x.device):
        return reference.coefficients(x, updates, slots, None).contiguous()


def _coefficients_backward(grad: Tensor, x: Tensor, v: Tensor, slots: Tensor, *rest: Any) -> list[Tensor]:
    gate, needs = rest[:-1], rest[-1]
    with exact_products(x.device):
        found = reference.coefficients_backward(grad, x, _coefficients_of(x, v, slots, *gate), slots, None, needs[0])
    return _chosen(needs, ("x", "down", "slots", "beta", "tau", "strength"), (x, v, slots, *gate), found)


torch.library.impl("keylock::low_rank_linear", "CompositeExplicitAutograd", _linear)
torch.library.impl("keylock::low_rank_linear_backward", "CompositeExplicitAutograd", _linear_backward)
torch.library.impl("keylock::low_rank_update", "CompositeExplicitAutograd", _update)
torch.library.impl("keylock::low_rank_update_backward", "CompositeExplicitAutograd", _update_backward)
torch.library.impl("keylock::rank_one_coefficients", "CompositeExplicitAutograd", _coefficients)
torch.library.impl("keylock::rank_one_coefficients_backward", "CompositeExplicitAutograd", _coefficients_backward)


@torch.library.register_fake("keylock::low_rank_linear")
def _(x, weight, *rest):
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.register_fake("keylock::low_rank_linear_backward")
def _(grad, *rest):
    return _fake_grads(rest[-1], rest[: len(_OF_LAYER)])


@torch.library.register_fake("keylock::low_rank_update")
def _(base, *rest):
    return base.new_empty(base.shape)


@torch.library.register_fake("keylock::low_rank_update_backward")
def _(grad, *rest):
    return _fake_grads(rest[-1], rest[: len(_OF_UPDATE)])


@torch.library.register_fake("keylock::rank_one_coefficients")
def _(x, v, slots, *gate):
    return x.new_empty(*x.shape[:2], slots.shape[1], dtype=accumulate_dtype(x.dtype))


@torch.library.register_fake("keylock::rank_one_coefficients_backward")
def _(grad, *rest):
    return _fake_grads(rest[-1], rest[:-1])


def _spread(needs: tuple[bool, ...], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """One entry per input: its gradient, or None where none was asked for."""
    rest = iter(grads)
    return tuple(next(rest) if need else None for need in needs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:-2])
        ctx.how = args[-2:]
        return _linear_op(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: where blocks are checkpointed they are computed again for whoever asks first
        refuse_double_backward(f"{_family(saved[6])}_linear")
        needs = ctx.needs_input_grad[:-2]
        return *_spread(needs, _linear_backward_op(grad, *saved, *ctx.how, list(needs))), None, None


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:-2])
        ctx.how = args[-2:]
        return _update_op(base, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        saved = ctx.saved_tensors
        refuse_double_backward(f"{_family(saved[3])}_update")
        needs = ctx.needs_input_grad[1:-2]
        found = _update_backward_op(grad, *saved, *ctx.how, list(needs)) if any(needs) else []
        return grad, *_spread(needs, found), None, None


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args)
        return _coefficients_op(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        refuse_double_backward("rank_one_coefficients")
        needs = ctx.needs_input_grad
        return _spread(needs, _coefficients_backward_op(grad, *ctx.saved_tensors, list(needs)))


def _family(offsets: Tensor | None) -> str:
    return "rank_one" if offsets is None else "low_rank"


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    updates: Updates,
    backend: str,
) -> Tensor:  # [B, N, O]
    """The op with autograd around it."""
    args = (x, weight, bias, output_scale, *updates, backend)
    return _Linear.apply(*args) if _wants_grad(*args[:-2]) else _linear_op(*args)


def update(base: Tensor, x: Tensor | None, updates: Updates, backend: str) -> Tensor:  # [B, N, O]
    """The op with autograd around it."""
    args = (base, x, *updates, backend)
    return _Update.apply(*args) if _wants_grad(*args[:-2]) else _update_op(*args)


def rank_one_coefficients(*args: Any) -> Tensor:
    """The op with autograd around it; arguments as in its schema."""
    return _Coefficients.apply(*args) if _wants_grad(*args) else _coefficients_op(*args)
