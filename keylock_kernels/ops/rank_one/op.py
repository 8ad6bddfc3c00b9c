"""Torch registration of the rank-one ops: schemas, implementations, fakes, and autograd outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulate_dtype, exact_products
from ..recording import refuse_double_backward
from . import reference

_LINEAR = (
    "Tensor x, Tensor weight, Tensor u, Tensor? v, Tensor slots, Tensor? bias, Tensor? beta, Tensor? tau,"
    " Tensor? strength, Tensor? coefficients"
)
_COEFFICIENTS = "Tensor x, Tensor v, Tensor slots, Tensor? beta, Tensor? tau, Tensor? strength"
_UPDATE = "Tensor u, Tensor slots, Tensor coefficients"

# A backward returns the gradients whose `needs` flag is set, in the order of the tensors above.
torch.library.define("keylock::rank_one_linear", f"({_LINEAR}, str backend) -> Tensor")
torch.library.define(
    "keylock::rank_one_linear_backward", f"(Tensor grad, {_LINEAR}, str backend, bool[] needs) -> Tensor[]"
)
torch.library.define("keylock::rank_one_coefficients", f"({_COEFFICIENTS}) -> Tensor")
torch.library.define(
    "keylock::rank_one_coefficients_backward", f"(Tensor grad, {_COEFFICIENTS}, bool[] needs) -> Tensor[]"
)
torch.library.define("keylock::rank_one_update", f"(Tensor base, {_UPDATE}, str backend) -> Tensor")
torch.library.define(
    "keylock::rank_one_update_backward", f"(Tensor grad, {_UPDATE}, str backend, bool[] needs) -> Tensor[]"
)

_NAMES = ("x", "weight", "u", "v", "slots", "bias", "beta", "tau", "strength", "coefficients")
_linear_op = torch.ops.keylock.rank_one_linear.default
_linear_backward_op = torch.ops.keylock.rank_one_linear_backward.default
_coefficients_op = torch.ops.keylock.rank_one_coefficients.default
_coefficients_backward_op = torch.ops.keylock.rank_one_coefficients_backward.default
_update_op = torch.ops.keylock.rank_one_update.default
_update_backward_op = torch.ops.keylock.rank_one_update_backward.default


def _check_slots(op: str, slots: Tensor, count: int) -> None:
    """Raise for a slot that does not exist, on the CPU; elsewhere looking would stall the device."""
    if slots.device.type != "cpu" or slots.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(slots))
    if low < -1 or high >= count:
        raise ValueError(f"{op}: slots must lie in [-1, {count}), got {low if low < -1 else high}")


def _native_linear(
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    u: Tensor,  # [S, O]
    v: Tensor | None,  # [S, K]
    slots: Tensor,  # [B, R]
    bias: Tensor | None,  # [O]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
    coefficients: Tensor | None,  # [B, T, R]
) -> Tensor:  # [B, T, O]
    from . import native

    in_one_kernel = native.multiplies(x)
    if coefficients is None or not in_one_kernel:  # that kernel looks at them itself
        _check_slots("rank_one_linear", slots, u.shape[0])
    if coefficients is None:
        assert v is not None  # the schema cannot say "one of the two"; api.py does
        coefficients = _coefficients(x, v, slots, beta, tau, strength)
    if in_one_kernel:
        return native.rank_one_linear(x, weight, bias, u, slots, coefficients)
    with exact_products(x.device):
        base = reference.base_product(x, weight, bias)
    return _native_update(base, u, slots, coefficients).to(x.dtype)


def _native_update(base: Tensor, u: Tensor, slots: Tensor, coefficients: Tensor) -> Tensor:
    from . import native

    # It wants a contiguous last dimension, which anything but a transposed view already has.
    base, u = (t if t.stride(-1) == 1 else t.contiguous() for t in (base, u))
    return native.rank_one_update(base, u, slots, coefficients)


def _native_added_backward(
    grad: Tensor, u: Tensor, slots: Tensor, coefficients: Tensor, need_u: bool, need_coefficients: bool
) -> tuple[Tensor | None, Tensor | None]:
    from . import native

    grad, u = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, u))
    return native.rank_one_update_backward(grad, u, slots, coefficients, need_u, need_coefficients)


def _chosen(needs: list[bool], inputs: list[Tensor | None], grads: list[Tensor | None]) -> list[Tensor]:
    """The gradients that were asked for, each in its input's dtype and in memory of its own."""
    kept = []
    for need, tensor, grad in zip(needs, inputs, grads, strict=True):
        if need and tensor is not None:
            kept.append(torch.zeros_like(tensor) if grad is None else grad.to(tensor.dtype).contiguous())
    return kept


def _fake_grads(needs: list[bool], inputs: list[Tensor | None]) -> list[Tensor]:
    return [t.new_empty(t.shape) for need, t in zip(needs, inputs, strict=True) if need and t is not None]


def _linear(
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    u: Tensor,  # [S, O]
    v: Tensor | None,  # [S, K]
    slots: Tensor,  # [B, R]
    bias: Tensor | None,  # [O]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
    coefficients: Tensor | None,  # [B, T, R]
    backend: str,
) -> Tensor:  # [B, T, O]
    if backend == "native":
        return _native_linear(x, weight, u, v, slots, bias, beta, tau, strength, coefficients)
    _check_slots("rank_one_linear", slots, u.shape[0])
    if backend == "triton":
        from . import triton

        return triton.linear(x, weight, u, v, slots, bias, beta, tau, strength, coefficients)
    with exact_products(x.device):
        if coefficients is None:
            assert v is not None  # the schema cannot say "one of the two"; api.py does
            coefficients = reference.coefficients(x, v, slots, beta, tau, strength)
        if backend == "cuda":
            from ... import native_cuda

            return native_cuda.rank_one_linear(x, weight, u, slots, bias, coefficients)
        return reference.linear(x, weight, u, slots, bias, coefficients).contiguous()


def _linear_backward(
    grad: Tensor,  # [B, T, O]
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    u: Tensor,  # [S, O]
    v: Tensor | None,  # [S, K]
    slots: Tensor,  # [B, R]
    bias: Tensor | None,  # [O]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
    coefficients: Tensor | None,  # [B, T, R]
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    need_x, need_weight, need_u, need_v, _, need_bias, need_beta, need_tau, need_strength, need_given = needs
    inputs = [x, weight, u, v, slots, bias, beta, tau, strength, coefficients]
    dtype = accumulate_dtype(x.dtype)
    with exact_products(x.device):
        wide = grad.to(dtype)
        dx = dweight = dv = dbeta = dtau = dstrength = dgiven = None
        if need_weight:
            dweight = wide.flatten(0, 1).mT @ x.to(dtype).flatten(0, 1)
        dbias = wide.sum((0, 1)) if need_bias else None
        if backend in ("triton", "cuda"):
            from . import triton

            wanted = dict(zip(_NAMES, needs, strict=True))
            found = triton.linear_backward(grad, x, weight, u, v, slots, beta, tau, strength, coefficients, wanted)
            every = {**found, "weight": dweight, "bias": dbias}
            return _chosen(needs, inputs, [every.get(name) for name in _NAMES])
        added_backward = _native_added_backward if backend == "native" else reference.added_backward
        if need_x:
            dx = reference.row_matmul(wide, weight.to(dtype))
        if coefficients is not None:
            du, dgiven = added_backward(wide, u, slots, coefficients.to(dtype), need_u, need_given)
        else:
            assert v is not None
            c = reference.coefficients(x, v, slots, beta, tau, strength)
            need_c = need_x or need_v or need_beta or need_tau or need_strength
            du, dc = added_backward(wide, u, slots, c, need_u, need_c)
            if dc is not None:
                through_gate, dv, dbeta, dtau, dstrength = reference.coefficients_backward(
                    dc, x, v, slots, beta, tau, strength, need_x
                )
                if dx is not None and through_gate is not None:
                    dx = dx + through_gate
    return _chosen(needs, inputs, [dx, dweight, du, dv, None, dbias, dbeta, dtau, dstrength, dgiven])


def _coefficients(
    x: Tensor,  # [B, T, K]
    v: Tensor,  # [S, K]
    slots: Tensor,  # [B, R]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
) -> Tensor:  # [B, T, R]
    _check_slots("rank_one_coefficients", slots, v.shape[0])
    with exact_products(x.device):
        return reference.coefficients(x, v, slots, beta, tau, strength).contiguous()


def _coefficients_backward(
    grad: Tensor,  # [B, T, R]
    x: Tensor,  # [B, T, K]
    v: Tensor,  # [S, K]
    slots: Tensor,  # [B, R]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
    needs: list[bool],
) -> list[Tensor]:
    with exact_products(x.device):
        dx, dv, dbeta, dtau, dstrength = reference.coefficients_backward(
            grad, x, v, slots, beta, tau, strength, needs[0]
        )
    return _chosen(needs, [x, v, slots, beta, tau, strength], [dx, dv, None, dbeta, dtau, dstrength])


def _update(
    base: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
    backend: str,
) -> Tensor:  # [B, T, O]
    _check_slots("rank_one_update", slots, u.shape[0])
    if backend == "triton":
        from . import triton

        return triton.update(base, u, slots, coefficients)
    if backend == "cuda":
        from ... import native_cuda

        return native_cuda.rank_one_update(base, u, slots, coefficients)
    with exact_products(base.device):
        if backend == "native":
            return _native_update(base, u, slots, coefficients)
        return reference.update(base, u, slots, coefficients).contiguous()


def _update_backward(
    grad: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    if backend in ("triton", "cuda"):
        from . import triton

        du, dc = triton.update_backward(grad, u, slots, coefficients, needs[0], needs[2])
        return _chosen(needs, [u, slots, coefficients], [du, None, dc])
    if backend == "native":
        du, dc = _native_added_backward(grad, u, slots, coefficients, needs[0], needs[2])
        return _chosen(needs, [u, slots, coefficients], [du, None, dc])
    dtype = accumulate_dtype(grad.dtype)
    with exact_products(grad.device):
        du, dc = reference.added_backward(grad.to(dtype), u, slots, coefficients.to(dtype), needs[0], needs[2])
    return _chosen(needs, [u, slots, coefficients], [du, None, dc])


torch.library.impl("keylock::rank_one_linear", "CompositeExplicitAutograd", _linear)
torch.library.impl("keylock::rank_one_linear_backward", "CompositeExplicitAutograd", _linear_backward)
torch.library.impl("keylock::rank_one_coefficients", "CompositeExplicitAutograd", _coefficients)
torch.library.impl("keylock::rank_one_coefficients_backward", "CompositeExplicitAutograd", _coefficients_backward)
torch.library.impl("keylock::rank_one_update", "CompositeExplicitAutograd", _update)
torch.library.impl("keylock::rank_one_update_backward", "CompositeExplicitAutograd", _update_backward)


@torch.library.register_fake("keylock::rank_one_linear")
def _(x, weight, u, v, slots, bias, beta, tau, strength, coefficients, backend):
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.register_fake("keylock::rank_one_linear_backward")
def _(grad, x, weight, u, v, slots, bias, beta, tau, strength, coefficients, backend, needs):
    return _fake_grads(needs, [x, weight, u, v, slots, bias, beta, tau, strength, coefficients])


@torch.library.register_fake("keylock::rank_one_coefficients")
def _(x, v, slots, beta, tau, strength):
    return x.new_empty(*x.shape[:2], slots.shape[1], dtype=accumulate_dtype(x.dtype))


@torch.library.register_fake("keylock::rank_one_coefficients_backward")
def _(grad, x, v, slots, beta, tau, strength, needs):
    return _fake_grads(needs, [x, v, slots, beta, tau, strength])


@torch.library.register_fake("keylock::rank_one_update")
def _(base, u, slots, coefficients, backend):
    return base.new_empty(base.shape)


@torch.library.register_fake("keylock::rank_one_update_backward")
def _(grad, u, slots, coefficients, backend, needs):
    return _fake_grads(needs, [u, slots, coefficients])


def _spread(needs: tuple[bool, ...], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """One entry per input: its gradient, or None where none was asked for."""
    rest = iter(grads)
    return tuple(next(rest) if need else None for need in needs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:-1])
        ctx.backend = args[-1]
        return _linear_op(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        refuse_double_backward("rank_one_linear")
        needs = ctx.needs_input_grad[:-1]
        return *_spread(needs, _linear_backward_op(grad, *ctx.saved_tensors, ctx.backend, list(needs))), None


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


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, u: Tensor, slots: Tensor, coefficients: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(u, slots, coefficients)
        ctx.backend = backend
        return _update_op(base, u, slots, coefficients, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        refuse_double_backward("rank_one_update")
        needs = ctx.needs_input_grad[1:4]
        found = _update_backward_op(grad, *ctx.saved_tensors, ctx.backend, list(needs)) if any(needs) else []
        return grad, *_spread(needs, found), None


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rank_one_linear(*args: Any) -> Tensor:
    """The op with autograd around it; arguments as in its schema."""
    return _Linear.apply(*args) if _wants_grad(*args[:-1]) else _linear_op(*args)


def rank_one_coefficients(*args: Any) -> Tensor:
    """The op with autograd around it; arguments as in its schema."""
    return _Coefficients.apply(*args) if _wants_grad(*args) else _coefficients_op(*args)


def rank_one_update(*args: Any) -> Tensor:
    """The op with autograd around it; arguments as in its schema."""
    return _Update.apply(*args) if _wants_grad(*args[:-1]) else _update_op(*args)
