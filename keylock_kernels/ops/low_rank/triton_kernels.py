"""Updates of low rank in Triton: a GEMM with the updates in its epilogue, forward and backward.

A tile holds tokens of one batch row only: no product mixes rows, so a neighbour's NaN has no way in. What a row's
slots take of the tables lies side by side, as one list of updates. Its first chunk rides the main loop as one narrow
product; further chunks loop over the activations again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..launching import INTERPRETED, dot

_INTERPRETED = tl.constexpr(INTERPRETED)  # where there is no libdevice


# What a kernel needs to know of a tensor: its data and strides. Triton takes them as named tuples.
class Tokens(NamedTuple):
    """[B, T, C]"""

    data: Any
    b: int
    t: int
    c: int


class Table(NamedTuple):
    """[P, C]"""

    data: Any
    s: int
    c: int


class Slots(NamedTuple):
    """[B, J], and [S + 1] where slots are adapters; `updates` is R, `total` P."""

    data: Any
    b: int
    j: int
    per_row: int  # J
    offsets: Any
    adapters: int  # S
    max_rank: int
    updates: int
    total: int


class PerUpdate(NamedTuple):
    """[P] or [B, J]: the strides along the axes that it lacks are 0."""

    data: Any
    b: int
    j: int
    s: int


@triton.jit
def _adapters(slots, row, J: tl.constexpr):
    """Where each slot's rows of the table begin [J], and where in the row's list they begin and end.

    A slot that does not exist takes one row, which does not exist.
    """
    j = tl.arange(0, J)
    slot = tl.load(slots.data + row * slots.b + j * slots.j, mask=j < slots.per_row, other=-1)
    exists = (slot >= 0) & (slot < slots.adapters)
    at = slots.offsets + tl.where(exists, slot, 0)
    begin = tl.load(at, mask=exists, other=0)
    rank = tl.load(at + 1, mask=exists, other=0) - begin
    missing = (slot != -1) & ((exists == 0) | (rank < 0) | (rank > slots.max_rank))
    rank = tl.where(missing, 1, rank)
    ends = tl.cumsum(rank, 0)
    return tl.where(missing, slots.total, begin), ends - rank, ends


@triton.jit
def _count(slots, row, J: tl.constexpr):
    """How long the row's list of updates is."""
    if slots.offsets is None:
        count = slots.updates
    else:
        _, _, ends = _adapters(slots, row, J)
        count = tl.max(ends, 0)
    return count


@triton.jit
def _updates(slots, row, first, J: tl.constexpr, C: tl.constexpr):
    """The chunk of a row's updates that starts at `first`.

    Their places in its list, the slots they come from, which are taken, safe rows of the table, and which are missing.
    """
    place = first + tl.arange(0, C)
    if slots.offsets is None:
        owner = place
        index = tl.load(slots.data + row * slots.b + place * slots.j, mask=place < slots.per_row, other=-1)
        found = index != -1
    else:
        begin, start, ends = _adapters(slots, row, J)
        hit = (place[None] >= start[:, None]) & (place[None] < ends[:, None])
        index = tl.sum(tl.where(hit, begin[:, None] + place[None] - start[:, None], 0), 0)
        owner = tl.sum(tl.where(hit, tl.arange(0, J)[:, None], 0), 0)
        found = tl.max(hit.to(tl.int32), 0) != 0
    taken = found & (index >= 0) & (index < slots.total)
    return place, owner, taken, tl.where(taken, index, 0).to(tl.int64), found & (taken == 0)


@triton.jit
def _per_update(table, row, owner, taken, index):
    at = row * table.b + owner * table.j + index * table.s
    return tl.load(table.data + at, mask=taken, other=0.0)


@triton.jit
def _token_weights(weights, row, owner, taken, token, tokens):
    """A tile of [B, J, N], transposed."""
    at = row * weights.b + owner[None].to(tl.int64) * weights.t + token[:, None] * weights.c
    return tl.load(weights.data + at, mask=(token < tokens)[:, None] & taken[None], other=0.0)


@triton.jit
def _selected_dot(c, values, acc):
    """c @ values + acc, in which a coefficient of exactly 0 is nothing even beside what is not finite."""
    finite = tl.abs(values) < float("inf")
    acc = dot(c.to(acc.dtype), tl.where(finite, values, 0.0).to(acc.dtype), acc)
    if tl.max(tl.max((finite == 0).to(tl.int32), 1), 0) != 0:
        # Of zeros and ones, which half precision has.
        hits = tl.dot((c != 0).to(tl.float16), (finite == 0).to(tl.float16))
        acc = tl.where(hits > 0, float("nan"), acc)
    return acc


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
    """The chunk's rows of a table, transposed; zeros for what is not taken, whatever the table holds."""
    return tl.load(v.data + index[None] * v.s + c[:, None] * v.c, mask=taken[None] & (c < width)[:, None], other=0.0)


@triton.jit
def _products(x, v, row, token, tokens, width, taken, index, ACC: tl.constexpr, BT: tl.constexpr,
              BK: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """x . v of one row's tokens and one chunk of its updates [BT, C]."""
    s = tl.zeros([BT, C], ACC)
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
def _scaled(c, row, token, tokens, owner, taken, index, strength, weights):
    """c times strength and weight, 0 where these are: whatever c is."""
    if strength is not None:
        factor = _per_update(strength, row, owner, taken, index)[None]
        c = tl.where(factor == 0, 0.0, c * factor)
    if weights is not None:
        factor = _token_weights(weights, row, owner, taken, token, tokens)
        c = tl.where(factor == 0, 0.0, c * factor)
    return tl.where(taken[None], c, 0.0)


@triton.jit
def _coefficients(s, row, token, tokens, owner, taken, index, beta, tau, strength, weights):
    """c of the products s."""
    c = s
    if beta is not None:
        c = _gate(s, _per_update(beta, row, owner, taken, index), _per_update(tau, row, owner, taken, index))
    return _scaled(c, row, token, tokens, owner, taken, index, strength, weights)


@triton.jit
def _slopes(s, dc, row, token, tokens, owner, taken, index, beta, tau, strength, weights):
    """ds of the gradient dc; s is not looked at where there is no gate."""
    ds = _scaled(dc, row, token, tokens, owner, taken, index, strength, weights)
    if beta is not None:
        width = _per_update(tau, row, owner, taken, index)
        g = _gate(s, _per_update(beta, row, owner, taken, index), width)
        linear = width == 0
        ds = tl.where(linear[None], ds, ds * g * (1 - g) / tl.where(linear, 1.0, width)[None])
    return tl.where(taken[None], ds, 0.0)


@triton.jit
def _kept(s, row, token, tokens, place, taken, updates):
    """A tile of a contiguous float32 [B, T, R]."""
    at = (row * tokens + token[:, None]) * updates + place[None]
    return tl.load(s + at, mask=(token < tokens)[:, None] & taken[None], other=0.0)


@triton.jit
def _add(acc, s, row, token, tokens, outputs, o, first, slots, u, given, beta, tau, strength, weights, similarity, dc,
         J: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """acc plus one chunk's updates, whose products with the activations are s."""
    place, owner, taken, index, missing = _updates(slots, row, first, J, C)
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
            c = _slopes(kept, s, row, token, tokens, owner, taken, index, beta, tau, strength, weights)
        else:
            c = _coefficients(s, row, token, tokens, owner, taken, index, beta, tau, strength, weights)
        inside = taken[:, None] & (o < outputs)[None]
        acc = _selected_dot(c, tl.load(u.data + index[:, None] * u.s + o[None] * u.c, mask=inside, other=0.0), acc)
    if u is not None and similarity is None:
        # A slot that does not exist: the row is NaN, since nobody can look without stalling the device.
        acc = tl.where(tl.max(missing.to(tl.int32), 0) != 0, float("nan"), acc)
    return acc


@triton.jit
def linear_kernel(
    x,  # [B, T, K]
    weight,  # [O, K]
    bias,  # [O]
    scale,  # [B, O]
    u,  # [P, O]
    v,  # [P, K]
    slots,  # [B, J]
    given,  # [B, T, R]
    beta,
    tau,
    strength,
    weights,  # [B, J, T]
    similarity,  # [B, T, R]
    dc,  # [B, T, R]
    y,  # [B, T, O]
    tokens,
    width,
    outputs,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
):
    """y = scale * (x weight^T + sum_r c u[row]) + bias.

    Forward, c comes from x . v or is given. Backward, x is the output's gradient, weight is transposed, v and u
    have changed places, and with them c is the slope of the gate at `similarity`; x . v itself is `dc`.
    """
    row = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    o = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    _, _, taken, index, _ = _updates(slots, row, 0, J, C)
    acc = tl.zeros([BT, BO], ACC)
    s = tl.zeros([BT, C], ACC)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        a = _activations(x, row, token, tokens, k, width)
        acc = dot(a, _load_weight(weight, o, outputs, k, width), acc)
        if v is not None:
            s = dot(a, _directions(v, taken, index, k, width), s)
    acc = _add(acc, s, row, token, tokens, outputs, o, 0, slots, u, given, beta, tau, strength, weights, similarity,
               dc, J, C)  # fmt: skip
    for first in range(C, _count(slots, row, J), C):
        if v is not None:
            _, _, taken, index, _ = _updates(slots, row, first, J, C)
            s = _products(x, v, row, token, tokens, width, taken, index, ACC, BT, BK, C)
        acc = _add(acc, s, row, token, tokens, outputs, o, first, slots, u, given, beta, tau, strength, weights,
                   similarity, dc, J, C)  # fmt: skip
    if scale is not None:
        acc *= tl.load(scale.data + row * scale.s + o * scale.c, mask=o < outputs, other=0.0)[None]
    if bias is not None:
        acc += tl.load(bias + o, mask=o < outputs, other=0.0)[None]
    _store_output(y, acc, row, token, tokens, o, outputs)


@triton.jit
def products_kernel(
    x,  # [B, T, C]
    v,  # [P, C]
    slots,  # [B, J]
    s,  # [B, T, R]
    tokens,
    width,
    BT: tl.constexpr,
    BK: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
):
    """s[b, t, r] = x[b, t] . v[row r of b's list], 0 where no update is taken."""
    row = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    place, _, taken, index, _ = _updates(slots, row, tl.program_id(1) * C, J, C)
    value = _products(x, v, row, token, tokens, width, taken, index, s.dtype.element_ty, BT, BK, C)
    at = (row * tokens + token[:, None]) * slots.updates + place[None]
    tl.store(s + at, value, mask=(token < tokens)[:, None] & (place < slots.updates)[None])


@triton.jit
def update_kernel(
    base,  # [B, T, O]
    x,  # [B, T, K]
    u,  # [P, O]
    v,  # [P, K]
    slots,  # [B, J]
    strength,
    weights,  # [B, J, T]
    y,  # [B, T, O]
    tokens,
    width,
    outputs,
    share,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
):
    """y = base + sum_r c u[row], c of x . v: some tokens, and `share` of the outputs."""
    row = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    count = _count(slots, row, J)
    _, _, taken, index, _ = _updates(slots, row, 0, J, C)
    s = _products(x, v, row, token, tokens, width, taken, index, ACC, BT, BK, C)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, outputs), BO):
        o = (start + tl.arange(0, BO)).to(tl.int64)
        acc = _activations(base, row, token, tokens, o, outputs).to(ACC)
        acc = _add(acc, s, row, token, tokens, outputs, o, 0, slots, u, None, None, None, strength, weights, None, None,
                   J, C)  # fmt: skip
        for first in range(C, count, C):
            _, _, more, rows, _ = _updates(slots, row, first, J, C)
            products = _products(x, v, row, token, tokens, width, more, rows, ACC, BT, BK, C)
            acc = _add(acc, products, row, token, tokens, outputs, o, first, slots, u, None, None, None, strength,
                       weights, None, None, J, C)  # fmt: skip
        _store_output(y, acc, row, token, tokens, o, outputs)


@triton.jit
def given_update_kernel(
    base,  # [B, T, O]
    u,  # [P, O]
    slots,  # [B, J]
    given,  # [B, T, J]
    y,  # [B, T, O]
    tokens,
    outputs,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    C: tl.constexpr,
    FEW: tl.constexpr,
):
    """y = base + sum_r c u[slot], c given; FEW updates, if it is not 0, one by one and not as a padded product."""
    row = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    o = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    acc = _activations(base, row, token, tokens, o, outputs).to(ACC)
    if FEW:
        for r in tl.static_range(FEW):
            slot = tl.load(slots.data + row * slots.b + r * slots.j + tl.zeros([1], tl.int32))
            taken = (slot >= 0) & (slot < slots.total)
            at = row * given.b + token * given.t + r * given.c
            c = tl.load(given.data + at, mask=(token < tokens) & taken, other=0.0).to(ACC)
            of_u = u.data + tl.where(taken, slot, 0).to(tl.int64) * u.s + o * u.c
            vector = tl.load(of_u, mask=(o < outputs) & taken, other=0.0).to(ACC)
            acc = tl.where((c != 0)[:, None], acc + c[:, None] * vector[None], acc)
            acc = tl.where(((slot != -1) & (taken == 0))[:, None], float("nan"), acc)
    else:
        for first in range(0, slots.updates, C):
            acc = _add(acc, None, row, token, tokens, outputs, o, first, slots, u, given, None, None, None, None, None,
                       None, 1, C)  # fmt: skip
    _store_output(y, acc, row, token, tokens, o, outputs)


@triton.jit
def table_part_kernel(
    x,  # [B, T, C]
    slots,  # [B, J]
    given,  # [B, T, R]
    similarity,  # [B, T, R]
    dc,  # [B, T, R]
    beta,
    tau,
    strength,
    weights,  # [B, J, T]
    part,  # [B, splits, R, C]
    tokens,
    width,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
):
    """part[b, i, r] = sum over a split's tokens of c[b, t, r] x[b, t]; with dc, of the slope instead of c."""
    chunks = tl.cdiv(slots.updates, C)
    row, split = tl.program_id(2).to(tl.int64), tl.program_id(1) // chunks
    c = (tl.program_id(0) * BC + tl.arange(0, BC)).to(tl.int64)
    place, owner, taken, index, _ = _updates(slots, row, tl.program_id(1) % chunks * C, J, C)
    acc = tl.zeros([C, BC], part.dtype.element_ty)
    for start in range(split * SPLIT, tl.minimum(tokens, (split + 1) * SPLIT), BT):
        token = (start + tl.arange(0, BT)).to(tl.int64)
        if given is not None:
            factor = _activations(given, row, token, tokens, tl.where(taken, place, slots.updates), slots.updates)
            factor = factor.to(acc.dtype)
        else:
            s = _kept(similarity, row, token, tokens, place, taken, slots.updates)
            if dc is not None:
                kept = _kept(dc, row, token, tokens, place, taken, slots.updates)
                factor = _slopes(s, kept, row, token, tokens, owner, taken, index, beta, tau, strength, weights)
            else:
                factor = _coefficients(s, row, token, tokens, owner, taken, index, beta, tau, strength, weights)
            factor = tl.where((token < tokens)[:, None], factor, 0.0)
        acc = _selected_dot(tl.trans(factor), _activations(x, row, token, tokens, c, width), acc)
    splits = tl.num_programs(1) // chunks
    at = ((row * splits + split) * slots.updates + place[:, None]) * width + c[None]
    tl.store(part + at, acc, mask=(place < slots.updates)[:, None] & (c < width)[None])


@triton.jit
def table_sum_kernel(
    part,  # [B, splits, R, C]
    slots,  # [B, J]
    grad,  # [P, C]
    rows,
    splits,
    width,
    BC: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
):
    """grad[p] = the sum of what the rows that take p have for it, always in the same order."""
    own = tl.program_id(1)
    c = (tl.program_id(0) * BC + tl.arange(0, BC)).to(tl.int64)
    acc = tl.zeros([BC], part.dtype.element_ty)
    for row in range(rows):
        for first in range(0, _count(slots, tl.cast(row, tl.int64), J), C):
            place, _, taken, index, _ = _updates(slots, tl.cast(row, tl.int64), first, J, C)
            hit = taken & (index == own)
            for split in range(tl.max(hit.to(tl.int32), 0) * splits):
                at = ((tl.cast(row, tl.int64) * splits + split) * slots.updates + place[:, None]) * width + c[None]
                value = tl.load(part + at, mask=hit[:, None] & (c < width)[None], other=0.0)
                acc += tl.sum(value, 0)
    tl.store(grad + own.to(tl.int64) * width + c, acc.to(grad.dtype.element_ty), mask=c < width)


@triton.jit
def gate_part_kernel(
    slots,  # [B, J]
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
    C: tl.constexpr,
):
    """Each row's share of the gradients of beta, tau and strength; 0 to beta and tau where tau is 0."""
    row = tl.program_id(1).to(tl.int64)
    place, owner, taken, index, _ = _updates(slots, row, tl.program_id(0) * C, 1, C)
    of_beta = tl.zeros([C], dc.dtype.element_ty)
    of_tau = tl.zeros([C], dc.dtype.element_ty)
    of_strength = tl.zeros([C], dc.dtype.element_ty)
    for start in range(0, tokens, BT):
        token = (start + tl.arange(0, BT)).to(tl.int64)
        s = _kept(similarity, row, token, tokens, place, taken, slots.updates)
        d = _kept(dc, row, token, tokens, place, taken, slots.updates)
        if dstrength is not None:
            of_strength += tl.sum(
                d * _coefficients(s, row, token, tokens, owner, taken, index, beta, tau, None, None), 0
            )
        if beta is not None:
            middle = _per_update(beta, row, owner, taken, index)
            width = _per_update(tau, row, owner, taken, index)
            sloped = taken & (width != 0)
            middle = tl.where(sloped, middle, 0.0)  # 0 times an infinite beta is NaN
            dz = tl.where(
                sloped[None], _slopes(s, d, row, token, tokens, owner, taken, index, beta, tau, strength, None), 0.0
            )
            of_beta -= tl.sum(dz, 0)
            of_tau -= tl.sum(dz * (s - middle[None]) / tl.where(sloped, width, 1.0)[None], 0)
    at = row * slots.updates + place
    inside = place < slots.updates
    if beta is not None:
        tl.store(dbeta + at, of_beta, mask=inside)
        tl.store(dtau + at, of_tau, mask=inside)
    if dstrength is not None:
        tl.store(dstrength + at, of_strength, mask=inside)
