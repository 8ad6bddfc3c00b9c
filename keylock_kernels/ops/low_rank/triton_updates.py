"""What a batch row's updates are to a Triton kernel: which rows of the tables they take, and what each is worth.

A tile holds tokens of one batch row only: no product mixes rows, so a neighbour's NaN has no way in. What a row's
slots take of the tables lies side by side, as one list of updates.
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
def count_updates(slots, row, J: tl.constexpr):
    """How long the row's list of updates is."""
    if slots.offsets is None:
        count = slots.updates
    else:
        _, _, ends = _adapters(slots, row, J)
        count = tl.max(ends, 0)
    return count


@triton.jit
def updates_of(slots, row, first, J: tl.constexpr, C: tl.constexpr):
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
def per_update(table, row, owner, taken, index):
    at = row * table.b + owner * table.j + index * table.s
    return tl.load(table.data + at, mask=taken, other=0.0)


@triton.jit
def _token_weights(weights, row, owner, taken, token, tokens):
    """A tile of [B, J, N], transposed."""
    at = row * weights.b + owner[None].to(tl.int64) * weights.t + token[:, None] * weights.c
    return tl.load(weights.data + at, mask=(token < tokens)[:, None] & taken[None], other=0.0)


@triton.jit
def selected_dot(c, values, acc):
    """c @ values + acc, in which a coefficient of exactly 0 is nothing even beside what is not finite."""
    finite = tl.abs(values) < float("inf")
    acc = dot(c.to(acc.dtype), tl.where(finite, values, 0.0).to(acc.dtype), acc)
    if tl.max(tl.max((finite == 0).to(tl.int32), 1), 0) != 0:
        # Of zeros and ones, which half precision has.
        hits = tl.dot((c != 0).to(tl.float16), (finite == 0).to(tl.float16))
        acc = tl.where(hits > 0, float("nan"), acc)
    return acc


@triton.jit
def activations_of(x, row, token, tokens, c, width):
    """A tile of [B, T, C]."""
    at = row * x.b + token[:, None] * x.t + c[None] * x.c
    return tl.load(x.data + at, mask=(token < tokens)[:, None] & (c < width)[None], other=0.0)


@triton.jit
def load_weight(weight, o, outputs, k, width):
    """A tile of [O, K], transposed."""
    inside = (k < width)[:, None] & (o < outputs)[None]
    return tl.load(weight.data + o[None] * weight.s + k[:, None] * weight.c, mask=inside, other=0.0)


@triton.jit
def store_output(y, value, row, token, tokens, o, outputs):
    """A tile of a contiguous [B, T, O]; the one rounding."""
    at = (row * tokens + token[:, None]) * outputs + o[None]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (o < outputs)[None])


@triton.jit
def directions_of(v, taken, index, c, width):
    """The chunk's rows of a table, transposed; zeros for what is not taken, whatever the table holds."""
    return tl.load(v.data + index[None] * v.s + c[:, None] * v.c, mask=taken[None] & (c < width)[:, None], other=0.0)


@triton.jit
def products_of(x, v, row, token, tokens, width, taken, index, ACC: tl.constexpr, BT: tl.constexpr,
              BK: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """x . v of one row's tokens and one chunk of its updates [BT, C]."""
    s = tl.zeros([BT, C], ACC)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        s = dot(activations_of(x, row, token, tokens, k, width), directions_of(v, taken, index, k, width), s)
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
        factor = per_update(strength, row, owner, taken, index)[None]
        c = tl.where(factor == 0, 0.0, c * factor)
    if weights is not None:
        factor = _token_weights(weights, row, owner, taken, token, tokens)
        c = tl.where(factor == 0, 0.0, c * factor)
    return tl.where(taken[None], c, 0.0)


@triton.jit
def coefficients_of(s, row, token, tokens, owner, taken, index, beta, tau, strength, weights):
    """c of the products s."""
    c = s
    if beta is not None:
        c = _gate(s, per_update(beta, row, owner, taken, index), per_update(tau, row, owner, taken, index))
    return _scaled(c, row, token, tokens, owner, taken, index, strength, weights)


@triton.jit
def slopes_of(s, dc, row, token, tokens, owner, taken, index, beta, tau, strength, weights):
    """ds of the gradient dc; s is not looked at where there is no gate."""
    ds = _scaled(dc, row, token, tokens, owner, taken, index, strength, weights)
    if beta is not None:
        width = per_update(tau, row, owner, taken, index)
        g = _gate(s, per_update(beta, row, owner, taken, index), width)
        linear = width == 0
        ds = tl.where(linear[None], ds, ds * g * (1 - g) / tl.where(linear, 1.0, width)[None])
    return tl.where(taken[None], ds, 0.0)


@triton.jit
def kept_of(s, row, token, tokens, place, taken, updates):
    """A tile of a contiguous float32 [B, T, R]."""
    at = (row * tokens + token[:, None]) * updates + place[None]
    return tl.load(s + at, mask=(token < tokens)[:, None] & taken[None], other=0.0)


@triton.jit
def added(acc, s, row, token, tokens, outputs, o, first, slots, u, given, beta, tau, strength, weights, similarity, dc,
          J: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """acc plus one chunk's updates, whose products with the activations are s."""
    place, owner, taken, index, missing = updates_of(slots, row, first, J, C)
    if dc is not None:
        at = (row * tokens + token[:, None]) * slots.updates + place[None]
        shown = (token < tokens)[:, None] & (place < slots.updates)[None]
        if tl.program_id(1) == 0:
            tl.store(dc + at, tl.where(taken[None], s, 0.0), mask=shown)
    if u is not None:
        if given is not None:
            c = activations_of(given, row, token, tokens, tl.where(taken, place, slots.updates), slots.updates)
        elif similarity is not None:
            kept = kept_of(similarity, row, token, tokens, place, taken, slots.updates)
            c = slopes_of(kept, s, row, token, tokens, owner, taken, index, beta, tau, strength, weights)
        else:
            c = coefficients_of(s, row, token, tokens, owner, taken, index, beta, tau, strength, weights)
        inside = taken[:, None] & (o < outputs)[None]
        acc = selected_dot(c, tl.load(u.data + index[:, None] * u.s + o[None] * u.c, mask=inside, other=0.0), acc)
    if u is not None and similarity is None:
        # A slot that does not exist: the row is NaN, since nobody can look without stalling the device.
        acc = tl.where(tl.max(missing.to(tl.int32), 0) != 0, float("nan"), acc)
    return acc
