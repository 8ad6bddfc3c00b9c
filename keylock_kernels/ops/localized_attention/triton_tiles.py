"""What the forward and backward kernels of localized attention share: tiles of pixels and keys, and their scores.

A tile of keys is a tuple (keys, values, bias, regions, broken key, broken value) with keys and values cut into
the parts of the head dimension: 40 is 32 and 16, since tiles are powers of two. Biases are in powers of two, and
-inf where there is no key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..launching import dot

LOG2E = tl.constexpr(1.4426950408889634)
READ = tl.constexpr(16)  # read-out tokens handled at once


# What a kernel needs to know of a tensor: its data and strides. Triton takes them as named tuples.
class Heads(NamedTuple):
    """[B, N or T, H, D]; all strides but the last in units of the kernel's UNIT elements."""

    data: Any
    b: int
    n: int
    h: int
    d: int


class Vectors(NamedTuple):
    """[B, N or T or M]"""

    data: Any
    b: int
    n: int


class Weights(NamedTuple):
    """[B, I, N], or [B, I] with `n` 0."""

    data: Any
    b: int
    i: int
    n: int


class Columns(NamedTuple):
    """[B, N, M] with `h` 0, [B, H, M] with `n` 0, or [B, H, N, M]."""

    data: Any
    b: int
    h: int
    n: int
    m: int


@triton.jit
def place(groups, heads):
    """Which part of which (row, head) a program has."""
    index = tl.program_id(0)
    both = index // groups
    return (both // heads).to(tl.int64), (both % heads).to(tl.int64), index % groups


@triton.jit
def load_part(x, row, head, n, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr):
    c = FIRST + tl.arange(0, WIDTH)
    start = x.data + (row * x.b + head * x.h) * UNIT
    at = n[:, None] * x.n * UNIT + c[None] * x.d
    mask = inside[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (c < D)[None]
    return tl.load(start + at, mask=mask, other=0.0)


@triton.jit
def load_rows(x, row, head, n, inside, D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr):
    """The rows n of one head, part by part; zeros where not `inside`."""
    first = load_part(x, row, head, n, inside, 0, PARTS[0], D, UNIT)
    if len(PARTS) == 1:
        return (first,)
    else:
        return first, load_part(x, row, head, n, inside, PARTS[0], PARTS[1], D, UNIT)


@triton.jit
def store_part(x, start, step, n, inside, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    c = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (c < D)[None]
    tl.store(x + start * D + n[:, None] * step * D + c[None], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(x, row, rows, head, heads, n, inside, values, D: tl.constexpr, PARTS: tl.constexpr):
    """Rows n of one head of a contiguous [B, rows, heads, D]."""
    start = row * rows * heads + head
    store_part(x, start, heads, n, inside, values[0], 0, PARTS[0], D)
    if len(PARTS) == 2:
        store_part(x, start, heads, n, inside, values[1], PARTS[0], PARTS[1], D)


@triton.jit
def zeros(BM: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    first = tl.zeros([BM, PARTS[0]], ACC)
    if len(PARTS) == 1:
        return (first,)
    else:
        return first, tl.zeros([BM, PARTS[1]], ACC)


@triton.jit
def _broken(parts):
    """Which rows hold something that is not finite."""
    found = tl.max((tl.abs(parts[0].to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1)
    if len(parts) == 2:
        found |= tl.max((tl.abs(parts[1].to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1)
    return found != 0


@triton.jit
def _cleared(parts, gone):
    first = tl.where(gone[:, None], 0.0, parts[0]).to(parts[0].dtype)
    if len(parts) == 1:
        return (first,)
    else:
        return first, tl.where(gone[:, None], 0.0, parts[1]).to(parts[1].dtype)


@triton.jit
def key_tile(key, value, bias, regions, row, head, first, end, SIZE: tl.constexpr, TAINT: tl.constexpr,
             D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The keys first .. first + SIZE - 1 that are below `end`.

    0 times NaN is NaN, so a value that a pixel may not see must be finite where it meets a probability of 0. A
    key with a bias of -inf has its values cleared; with TAINT, where who sees what differs from pixel to pixel, so
    has a broken key, and who sees it is told by its mark.
    """
    t = (first + tl.arange(0, SIZE)).to(tl.int64)
    inside = t < end
    keys = load_rows(key, row, head, t, inside, D, PARTS, UNIT)
    values = load_rows(value, row, head, t, inside, D, PARTS, UNIT)
    b = tl.where(inside, 0.0, float("-inf")).to(ACC)
    if bias is not None:
        b = tl.load(bias.data + row * bias.b + t * bias.n, mask=inside, other=float("-inf")).to(ACC) * LOG2E
        hidden = b == float("-inf")
        keys, values = _cleared(keys, hidden), _cleared(values, hidden)
    seen_from = tl.zeros([SIZE], tl.int32)
    if regions is not None:
        seen_from = tl.load(regions.data + row * regions.b + t * regions.n, mask=inside, other=0)
    broken_key, broken_value = inside, inside
    if TAINT:
        broken_key, broken_value = _broken(keys), _broken(values)
        keys, values = _cleared(keys, broken_key), _cleared(values, broken_value)
    return keys, values, b, seen_from, broken_key, broken_value


@triton.jit
def product(a, b, out):
    """out + a . b over all parts of the head dimension: [M, D] and [N, D] to [M, N]."""
    out = dot(a[0], tl.trans(b[0]), out)
    if len(a) == 2:
        out = dot(a[1], tl.trans(b[1]), out)
    return out


@triton.jit
def spread(p, parts, out):
    """out + p parts: [M, N] and [N, D] to [M, D]."""
    p = p.to(parts[0].dtype)
    first = dot(p, parts[0], out[0])
    if len(parts) == 1:
        return (first,)
    else:
        return first, dot(p, parts[1], out[1])


@triton.jit
def scaled(parts, factor):
    """Each row of [M, D] times its factor."""
    first = parts[0] * factor[:, None]
    if len(parts) == 1:
        return (first,)
    else:
        return first, parts[1] * factor[:, None]


@triton.jit
def scores(q, tile, scale, pixel_regions, BIAS: tl.constexpr, REGIONS: tl.constexpr, TAINT: tl.constexpr,
           RAGGED: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Scores in powers of two [BM, KT]; -inf where a key is not seen, NaN where a broken one is.

    RAGGED: some of the tile's places may hold no key.
    """
    keys, _, bias, regions, broken, _ = tile
    s = product(q, keys, tl.zeros([q[0].shape[0], keys[0].shape[0]], ACC)) * scale
    if BIAS:
        s += bias[None]
    if TAINT:
        s = tl.where(broken[None], float("nan"), s)
    if BIAS or RAGGED:
        s = tl.where((bias == float("-inf"))[None], float("-inf"), s)
    if REGIONS:
        s = tl.where((pixel_regions[:, None] & regions[None]) == 0, float("-inf"), s)
    return s


@triton.jit
def finite(top):
    """The largest score, or 0 where no key is seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def inverse(total):
    """1 / total, or 0 where no key is seen."""
    return tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))


@triton.jit
def told(p, s, broken, TAINT: tl.constexpr):
    """The probabilities that meet the values: NaN where a broken value is seen."""
    if TAINT:
        p = tl.where(broken[None] & (s != float("-inf")), float("nan"), p)
    return p


@triton.jit
def stream_weight(weights, row, stream, pixel, inside, ACC: tl.constexpr):
    """w of one image stream [BM]."""
    at = weights.data + row * weights.b + stream * weights.i + pixel * weights.n
    return tl.load(at, mask=inside, other=0.0).to(ACC)


@triton.jit
def read_tokens(tokens, row, first, read):
    """A chunk of a row's read-out tokens; -1 where there is none."""
    m = first + tl.arange(0, READ)
    return tl.load(tokens.data + row * tokens.b + m * tokens.n, mask=m < read, other=-1)


@triton.jit
def load_columns(x, row, head, pixel, inside, first, read, ACC: tl.constexpr):
    """A chunk of columns [BM, 16]."""
    m = first + tl.arange(0, READ)
    at = x.data + row * x.b + head * x.h + pixel[:, None] * x.n + m[None] * x.m
    return tl.load(at, mask=inside[:, None] & (m < read)[None], other=0.0).to(ACC)
