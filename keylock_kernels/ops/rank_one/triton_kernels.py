"""The gated rank-one update in Triton: a GEMM with the update in its epilogue, forward and backward.

A tile holds tokens of one batch row only: no product mixes rows, so a neighbour's NaN has no way in.
The 77 tokens of a prompt are 64 and 16 that share the weight's tile. Up to 16 of a row's updates ride
the main loop as one narrow product; further chunks of 16 loop over the activations again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..launching import INTERPRETED, dot

CHUNK = tl.constexpr(16)  # updates handled at once: the narrowest tile of a matrix unit
_INTERPRETED = tl.constexpr(INTERPRETED)  # where there is no libdevice


# What a kernel needs to know of a tensor: its data and strides. Triton takes them as named tuples.
class Tokens(NamedTuple):
    """[B, T, C]"""

    data: Any
    b: int
    t: int
    c: int


class Table(NamedTuple):
    """[S, C]"""

    data: Any
    s: int
    c: int


class Slots(NamedTuple):
    """[B, R]; `total` is S."""

    data: Any
    b: int
    r: int
    updates: int
    total: int


class PerUpdate(NamedTuple):
    """[S] or [B, R]: the strides along the axes that it lacks are 0."""

    data: Any
    b: int
    r: int
    s: int


@triton.jit
def _updates(slots, row, first):
    """The chunk of a row's updates that starts at `first`: places, slots, which are taken, and safe indices."""
    place = first + tl.arange(0, CHUNK)
    slot = tl.load(slots.data + row * slots.b + place * slots.r, mask=place < slots.updates, other=-1)
    taken = (slot >= 0) & (slot < slots.total)
    return place, slot, taken, tl.where(taken, slot, 0).to(tl.int64)


@triton.jit
def _per_update(table, row, place, taken, index):
    at = row * table.b + place * table.r + index * table.s
    return tl.load(table.data + at, mask=taken, other=0.0)


@triton.jit
def _activations(x, row, token, tokens, c, width):
    """A tile of [B, T, C]."""
    at = row * x.b + token[:, None] * x.t + c[None] * x.c
    return tl.load(x.data + at, mask=(token < tokens)[:, None] & (c < width)[None], other=0.0)


@triton.jit
def _load_weight(weight, o, outputs, k, width):
    """A tile of [O, K], transposed."""
    inside = (k < width)[:, None] & (o < outputs)[None]
    return tl.load(weight.data + o[None] * weight.s + k[:, None] * weight.c, mask=inside, other=0.0)


@triton.jit
def _store_output(y, value, row, token, tokens, o, outputs):
    """A tile of a contiguous [B, T, O]; the one rounding."""
    at = (row * tokens + token[:, None]) * outputs + o[None]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (o < outputs)[None])


@triton.jit
def _directions(v, taken, index, c, width):
    """The chunk's rows of a table, transposed [C, 16]; zeros for what is not taken, whatever the table holds."""
    return tl.load(v.data + index[None] * v.s + c[:, None] * v.c, mask=taken[None] & (c < width)[:, None], other=0.0)


@triton.jit
def _products(x, v, row, token, tokens, width, taken, index, ACC: tl.constexpr, BT: tl.constexpr,
              BK: tl.constexpr):  # fmt: skip
    """x . v of one row's tokens and one chunk of its updates [BT, 16]."""
    s = tl.zeros([BT, CHUNK], ACC)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        s = dot(_activations(x, row, token, tokens, k, width), _directions(v, taken, index, k, width), s)
    return tl.where(taken[None], s, 0.0)


@triton.jit
def _corrected(q, a, b, inverse):
    """The quotient q of a and b, off by units in the last place, corrected by what it leaves of a.

    A division that rounds correctly by itself has a branch for the extremes, whose registers make the GEMM spill.
    """
    if _INTERPRETED or q.dtype == tl.float64:  # which are rounded correctly as they are
        return q
    else:
        rest = tl.fma(-q, b, a)
        return tl.where(tl.abs(rest) < float("inf"), tl.fma(rest, inverse, q), q)


@triton.jit
def _gate(s, beta, tau):
    """Rounded as eager rounds it: `/` and tl.exp err by more, and a steep gate passes that on to every gradient."""
    linear = tau == 0
    width = tl.where(linear, 1.0, tau)
    z = _corrected((s - beta[None]) / width[None], s - beta[None], width[None], (1 / width)[None])
    whole = 1 + (tl.exp(-z) if _INTERPRETED else libdevice.exp(-z))
    g = 1 / whole
    return tl.where(linear[None], s, _corrected(g, tl.full(s.shape, 1.0, s.dtype), whole, g))


@triton.jit
def _coefficients(s, row, place, taken, index, beta, tau, strength):
    """c of the products s."""
    c = s
    if beta is not None:
        c = _gate(s, _per_update(beta, row, place, taken, index), _per_update(tau, row, place, taken, index))
    if strength is not None:
        c = c * _per_update(strength, row, place, taken, index)[None]
    return tl.where(taken[None], c, 0.0)


@triton.jit
def _slopes(s, dc, row, place, taken, index, beta, tau, strength):
    """ds of the gradient dc; s is not looked at where there is no gate."""
    ds = dc
    if strength is not None:
        ds = ds * _per_update(strength, row, place, taken, index)[None]
    if beta is not None:
        width = _per_update(tau, row, place, taken, index)
        g = _gate(s, _per_update(beta, row, place, taken, index), width)
        linear = width == 0
        ds = tl.where(linear[None], ds, ds * g * (1 - g) / tl.where(linear, 1.0, width)[None])
    return tl.where(taken[None], ds, 0.0)


@triton.jit
def _kept(s, row, token, tokens, place, taken, updates):
    """A tile of a contiguous float32 [B, T, R]."""
    at = (row * tokens + token[:, None]) * updates + place[None]
    return tl.load(s + at, mask=(token < tokens)[:, None] & taken[None], other=0.0)


@triton.jit
def _add(acc, s, row, token, tokens, outputs, o, first, slots, u, given, beta, tau, strength, similarity, dc):
    """acc plus one chunk's updates, whose products with the activations are s."""
    place, slot, taken, index = _updates(slots, row, first)
    if dc is not None:
        at = (row * tokens + token[:, None]) * slots.updates + place[None]
        shown = (token < tokens)[:, None] & (place < slots.updates)[None]
        if tl.program_id(1) == 0:
            tl.store(dc + at, tl.where(taken[None], s, 0.0), mask=shown)
    if u is not None:
        if given is not None:
            c = _activations(given, row, token, tokens, tl.where(taken, place, slots.updates), slots.updates)
        elif similarity is not None:
            kept = _kept(similarity, row, token, tokens, place, taken, slots.updates)
            c = _slopes(kept, s, row, place, taken, index, beta, tau, strength)
        else:
            c = _coefficients(s, row, place, taken, index, beta, tau, strength)
        inside = taken[:, None] & (o < outputs)[None]
        vectors = tl.load(u.data + index[:, None] * u.s + o[None] * u.c, mask=inside, other=0.0)
        acc = dot(c.to(acc.dtype), vectors.to(acc.dtype), acc)
    if u is not None and similarity is None:
        # A slot that does not exist: the row is NaN, since nobody can look without stalling the device.
        missing = tl.max(((slot != -1) & (taken == 0)).to(tl.int32), 0)
        acc = tl.where(missing != 0, float("nan"), acc)
    return acc


@triton.jit
def _finish(acc, s, x, v, bias, y, row, token, tokens, width, outputs, o, slots, u, given, beta, tau, strength,
            similarity, dc, BT: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Every chunk of updates, the bias, and the one rounding."""
    acc = _add(acc, s, row, token, tokens, outputs, o, 0, slots, u, given, beta, tau, strength, similarity, dc)
    for first in range(CHUNK, slots.updates, CHUNK):
        if v is not None:
            _, _, taken, index = _updates(slots, row, first)
            s = _products(x, v, row, token, tokens, width, taken, index, acc.dtype, BT, BK)
        acc = _add(acc, s, row, token, tokens, outputs, o, first, slots, u, given, beta, tau, strength, similarity,
                   dc)  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + o, mask=o < outputs, other=0.0)[None]
    _store_output(y, acc, row, token, tokens, o, outputs)


@triton.jit
def linear_kernel(
    x,  # [B, T, K]
    weight,  # [O, K]
    bias,  # [O]
    u,  # [S, O]
    v,  # [S, K]
    slots,  # [B, R]
    given,  # [B, T, R]
    beta,
    tau,
    strength,
    similarity,  # [B, T, R]
    dc,  # [B, T, R]
    y,  # [B, T, O]
    tokens,
    width,
    outputs,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    TAIL: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """y = x weight^T + bias + sum_r c u[slot].

    Forward, c comes from x . v or is given. Backward, x is the output's gradient, weight is transposed, v and u
    have changed places, and with them c is the slope of the gate at `similarity`; x . v itself is `dc`.
    """
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * (BT + TAIL)
    token = (first + tl.arange(0, BT)).to(tl.int64)
    o = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    _, _, taken, index = _updates(slots, row, 0)
    acc = tl.zeros([BT, BO], ACC)
    s = tl.zeros([BT, CHUNK], ACC)
    if TAIL:
        last = (first + BT + tl.arange(0, TAIL)).to(tl.int64)
        acc_last = tl.zeros([TAIL, BO], ACC)
        s_last = tl.zeros([TAIL, CHUNK], ACC)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        w = _load_weight(weight, o, outputs, k, width)
        a = _activations(x, row, token, tokens, k, width)
        acc = dot(a, w, acc)
        if v is not None:
            directions = _directions(v, taken, index, k, width)
            s = dot(a, directions, s)
        if TAIL:
            a_last = _activations(x, row, last, tokens, k, width)
            acc_last = dot(a_last, w, acc_last)
            if v is not None:
                s_last = dot(a_last, directions, s_last)
    _finish(acc, s, x, v, bias, y, row, token, tokens, width, outputs, o, slots, u, given, beta, tau, strength,
            similarity, dc, BT, BK)  # fmt: skip
    if TAIL:
        _finish(acc_last, s_last, x, v, bias, y, row, last, tokens, width, outputs, o, slots, u, given, beta, tau,
                strength, similarity, dc, TAIL, BK)  # fmt: skip


@triton.jit
def products_kernel(
    x,  # [B, T, C]
    v,  # [S, C]
    slots,  # [B, R]
    s,  # [B, T, R]
    tokens,
    width,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """s[b, t, r] = x[b, t] . v[slots[b, r]], 0 where no update is taken."""
    row = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    place, _, taken, index = _updates(slots, row, tl.program_id(1) * CHUNK)
    value = _products(x, v, row, token, tokens, width, taken, index, s.dtype.element_ty, BT, BK)
    at = (row * tokens + token[:, None]) * slots.updates + place[None]
    tl.store(s + at, value, mask=(token < tokens)[:, None] & (place < slots.updates)[None])


@triton.jit
def update_kernel(
    base,  # [B, T, O]
    u,  # [S, O]
    slots,  # [B, R]
    given,  # [B, T, R]
    y,  # [B, T, O]
    tokens,
    outputs,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    """y = base + sum_r c u[slot]."""
    row = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    o = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    acc = _activations(base, row, token, tokens, o, outputs).to(ACC)
    for first in range(0, slots.updates, CHUNK):
        acc = _add(acc, None, row, token, tokens, outputs, o, first, slots, u, given, None, None, None, None, None)
    _store_output(y, acc, row, token, tokens, o, outputs)


@triton.jit
def table_part_kernel(
    x,  # [B, T, C]
    slots,  # [B, R]
    given,  # [B, T, R]
    similarity,  # [B, T, R]
    dc,  # [B, T, R]
    beta,
    tau,
    strength,
    part,  # [B, splits, R, C]
    tokens,
    width,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """part[b, i, r] = sum over a split's tokens of c[b, t, r] x[b, t]; with dc, of the slope instead of c."""
    chunks = tl.cdiv(slots.updates, CHUNK)
    row, split = tl.program_id(2).to(tl.int64), tl.program_id(1) // chunks
    c = (tl.program_id(0) * BC + tl.arange(0, BC)).to(tl.int64)
    place, _, taken, index = _updates(slots, row, tl.program_id(1) % chunks * CHUNK)
    acc = tl.zeros([CHUNK, BC], part.dtype.element_ty)
    for start in range(split * SPLIT, tl.minimum(tokens, (split + 1) * SPLIT), BT):
        token = (start + tl.arange(0, BT)).to(tl.int64)
        if given is not None:
            factor = _activations(given, row, token, tokens, tl.where(taken, place, slots.updates), slots.updates)
            factor = factor.to(acc.dtype)
        else:
            s = _kept(similarity, row, token, tokens, place, taken, slots.updates)
            if dc is not None:
                kept = _kept(dc, row, token, tokens, place, taken, slots.updates)
                factor = _slopes(s, kept, row, place, taken, index, beta, tau, strength)
            else:
                factor = _coefficients(s, row, place, taken, index, beta, tau, strength)
            factor = tl.where((token < tokens)[:, None], factor, 0.0)
        value = _activations(x, row, token, tokens, c, width).to(acc.dtype)
        acc = dot(tl.trans(factor), value, acc)
    splits = tl.num_programs(1) // chunks
    at = ((row * splits + split) * slots.updates + place[:, None]) * width + c[None]
    tl.store(part + at, acc, mask=(place < slots.updates)[:, None] & (c < width)[None])


@triton.jit
def table_sum_kernel(
    part,  # [B, splits, R, C]
    slots,  # [B, R]
    grad,  # [S, C]
    rows,
    splits,
    width,
    BC: tl.constexpr,
):
    """grad[s] = the sum of what the rows that take slot s have for it, always in the same order."""
    own = tl.program_id(1)
    c = (tl.program_id(0) * BC + tl.arange(0, BC)).to(tl.int64)
    acc = tl.zeros([BC], part.dtype.element_ty)
    for row in range(rows):
        for first in range(0, slots.updates, CHUNK):
            place, slot, _, _ = _updates(slots, tl.cast(row, tl.int64), first)
            hit = slot == own
            if tl.max(hit.to(tl.int32), 0) != 0:
                for split in range(splits):
                    at = ((tl.cast(row, tl.int64) * splits + split) * slots.updates + place[:, None]) * width + c[None]
                    value = tl.load(part + at, mask=hit[:, None] & (c < width)[None], other=0.0)
                    acc += tl.sum(value, 0)
    tl.store(grad + own.to(tl.int64) * width + c, acc.to(grad.dtype.element_ty), mask=c < width)


@triton.jit
def gate_part_kernel(
    slots,  # [B, R]
    similarity,  # [B, T, R]
    dc,  # [B, T, R]
    beta,
    tau,
    strength,
    dbeta,  # [B, R]
    dtau,  # [B, R]
    dstrength,  # [B, R]
    tokens,
    BT: tl.constexpr,
):
    """Each row's share of the gradients of beta, tau and strength; 0 to beta and tau where tau is 0."""
    row = tl.program_id(1).to(tl.int64)
    place, _, taken, index = _updates(slots, row, tl.program_id(0) * CHUNK)
    of_beta = tl.zeros([CHUNK], dc.dtype.element_ty)
    of_tau = tl.zeros([CHUNK], dc.dtype.element_ty)
    of_strength = tl.zeros([CHUNK], dc.dtype.element_ty)
    for start in range(0, tokens, BT):
        token = (start + tl.arange(0, BT)).to(tl.int64)
        s = _kept(similarity, row, token, tokens, place, taken, slots.updates)
        d = _kept(dc, row, token, tokens, place, taken, slots.updates)
        if dstrength is not None:
            of_strength += tl.sum(d * _coefficients(s, row, place, taken, index, beta, tau, None), 0)
        if beta is not None:
            middle = _per_update(beta, row, place, taken, index)
            width = _per_update(tau, row, place, taken, index)
            sloped = taken & (width != 0)
            middle = tl.where(sloped, middle, 0.0)  # 0 times an infinite beta is NaN
            dz = tl.where(sloped[None], _slopes(s, d, row, place, taken, index, beta, tau, strength), 0.0)
            of_beta -= tl.sum(dz, 0)
            of_tau -= tl.sum(dz * (s - middle[None]) / tl.where(sloped, width, 1.0)[None], 0)
    at = row * slots.updates + place
    inside = place < slots.updates
    if beta is not None:
        tl.store(dbeta + at, of_beta, mask=inside)
        tl.store(dtau + at, of_tau, mask=inside)
    if dstrength is not None:
        tl.store(dstrength + at, of_strength, mask=inside)
