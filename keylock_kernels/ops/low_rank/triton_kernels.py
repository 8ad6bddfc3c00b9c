"""Updates of low rank in Triton: a GEMM with the updates in its epilogue, forward and backward.

A tile holds tokens of one batch row only: no product mixes rows, so a neighbour's NaN has no way in. What a row's
slots take of the tables lies side by side, as one list of updates. Its first chunk rides the main loop as one narrow
product; further chunks loop over the activations again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launching import dot
from .triton_updates import (
    activations_of,
    added,
    coefficients_of,
    count_updates,
    directions_of,
    kept_of,
    load_weight,
    per_update,
    products_of,
    selected_dot,
    slopes_of,
    store_output,
    updates_of,
)


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
    _, _, taken, index, _ = updates_of(slots, row, 0, J, C)
    acc = tl.zeros([BT, BO], ACC)
    s = tl.zeros([BT, C], ACC)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        a = activations_of(x, row, token, tokens, k, width)
        acc = dot(a, load_weight(weight, o, outputs, k, width), acc)
        if v is not None:
            s = dot(a, directions_of(v, taken, index, k, width), s)
    acc = added(acc, s, row, token, tokens, outputs, o, 0, slots, u, given, beta, tau, strength, weights, similarity,
                dc, J, C)  # fmt: skip
    for first in range(C, count_updates(slots, row, J), C):
        if v is not None:
            _, _, taken, index, _ = updates_of(slots, row, first, J, C)
            s = products_of(x, v, row, token, tokens, width, taken, index, ACC, BT, BK, C)
        acc = added(acc, s, row, token, tokens, outputs, o, first, slots, u, given, beta, tau, strength, weights,
                    similarity, dc, J, C)  # fmt: skip
    if scale is not None:
        acc *= tl.load(scale.data + row * scale.s + o * scale.c, mask=o < outputs, other=0.0)[None]
    if bias is not None:
        acc += tl.load(bias + o, mask=o < outputs, other=0.0)[None]
    store_output(y, acc, row, token, tokens, o, outputs)


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
    place, _, taken, index, _ = updates_of(slots, row, tl.program_id(1) * C, J, C)
    value = products_of(x, v, row, token, tokens, width, taken, index, s.dtype.element_ty, BT, BK, C)
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
    count = count_updates(slots, row, J)
    _, _, taken, index, _ = updates_of(slots, row, 0, J, C)
    s = products_of(x, v, row, token, tokens, width, taken, index, ACC, BT, BK, C)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, outputs), BO):
        o = (start + tl.arange(0, BO)).to(tl.int64)
        acc = activations_of(base, row, token, tokens, o, outputs).to(ACC)
        acc = added(acc, s, row, token, tokens, outputs, o, 0, slots, u, None, None, None, strength, weights, None,
                    None, J, C)  # fmt: skip
        for first in range(C, count, C):
            _, _, more, rows, _ = updates_of(slots, row, first, J, C)
            products = products_of(x, v, row, token, tokens, width, more, rows, ACC, BT, BK, C)
            acc = added(acc, products, row, token, tokens, outputs, o, first, slots, u, None, None, None, strength,
                        weights, None, None, J, C)  # fmt: skip
        store_output(y, acc, row, token, tokens, o, outputs)


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
    acc = activations_of(base, row, token, tokens, o, outputs).to(ACC)
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
            acc = added(acc, None, row, token, tokens, outputs, o, first, slots, u, given, None, None, None, None, None,
                        None, 1, C)  # fmt: skip
    store_output(y, acc, row, token, tokens, o, outputs)


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
    place, owner, taken, index, _ = updates_of(slots, row, tl.program_id(1) % chunks * C, J, C)
    acc = tl.zeros([C, BC], part.dtype.element_ty)
    for start in range(split * SPLIT, tl.minimum(tokens, (split + 1) * SPLIT), BT):
        token = (start + tl.arange(0, BT)).to(tl.int64)
        if given is not None:
            factor = activations_of(given, row, token, tokens, tl.where(taken, place, slots.updates), slots.updates)
            factor = factor.to(acc.dtype)
        else:
            s = kept_of(similarity, row, token, tokens, place, taken, slots.updates)
            if dc is not None:
                kept = kept_of(dc, row, token, tokens, place, taken, slots.updates)
                factor = slopes_of(s, kept, row, token, tokens, owner, taken, index, beta, tau, strength, weights)
            else:
                factor = coefficients_of(s, row, token, tokens, owner, taken, index, beta, tau, strength, weights)
            factor = tl.where((token < tokens)[:, None], factor, 0.0)
        acc = selected_dot(tl.trans(factor), activations_of(x, row, token, tokens, c, width), acc)
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
    own = tl.program_id(0)
    c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)
    acc = tl.zeros([BC], part.dtype.element_ty)
    for row in range(rows):
        for first in range(0, count_updates(slots, tl.cast(row, tl.int64), J), C):
            place, _, taken, index, _ = updates_of(slots, tl.cast(row, tl.int64), first, J, C)
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
    place, owner, taken, index, _ = updates_of(slots, row, tl.program_id(0) * C, 1, C)
    of_beta = tl.zeros([C], dc.dtype.element_ty)
    of_tau = tl.zeros([C], dc.dtype.element_ty)
    of_strength = tl.zeros([C], dc.dtype.element_ty)
    for start in range(0, tokens, BT):
        token = (start + tl.arange(0, BT)).to(tl.int64)
        s = kept_of(similarity, row, token, tokens, place, taken, slots.updates)
        d = kept_of(dc, row, token, tokens, place, taken, slots.updates)
        if dstrength is not None:
            of_strength += tl.sum(
                d * coefficients_of(s, row, token, tokens, owner, taken, index, beta, tau, None, None), 0
            )
        if beta is not None:
            middle = per_update(beta, row, owner, taken, index)
            width = per_update(tau, row, owner, taken, index)
            sloped = taken & (width != 0)
            middle = tl.where(sloped, middle, 0.0)  # 0 times an infinite beta is NaN
            dz = tl.where(
                sloped[None], slopes_of(s, d, row, token, tokens, owner, taken, index, beta, tau, strength, None), 0.0
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
