"""What the forward and backward kernels of localized attention share: tiles of pixels and keys, and their scores.

A tile of keys is a tuple (keys, values, bias, regions) with keys and values cut into the parts of the head
dimension: 40 is 32 and 16, since tiles are powers of two. The bias is in powers of two; it is -inf where there is
no key or a hidden one, and NaN where a key or its value is broken, that is, not finite.
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, whose types are not Python's.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..launching import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
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
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], ACC)


@triton.jit
def zeros(ROWS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    first = _zeros(ROWS, PARTS[0], ACC)
    if len(PARTS) == 1:
        return (first,)
    else:
        return first, _zeros(ROWS, PARTS[1], ACC)


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
def vector(x, row, n, inside, other):
    return tl.load(x.data + row * x.b + n * x.n, mask=inside, other=other)


@triton.jit
def key_tile(key, value, bias, regions, row, head, first, end, SIZE: tl.constexpr, TAINT: tl.constexpr,
             D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The keys first .. first + SIZE - 1 that are below `end`.

    0 times NaN is NaN, so what a pixel may not see must be finite where it meets a probability of 0. A key with a
    bias of -inf is cleared; with TAINT, where who sees what differs from pixel to pixel, so is a broken key, and
    whoever sees it is told by its bias.
    """
    t = (first + tl.arange(0, SIZE)).to(tl.int64)
    inside = t < end
    keys = load_rows(key, row, head, t, inside, D, PARTS, UNIT)
    values = load_rows(value, row, head, t, inside, D, PARTS, UNIT)
    b = tl.where(inside, 0.0, float("-inf")).to(ACC)
    if bias is not None:
        b = vector(bias, row, t, inside, float("-inf")).to(ACC) * LOG2E
        hidden = b == float("-inf")
        keys, values = _cleared(keys, hidden), _cleared(values, hidden)
    seen_from = tl.zeros([SIZE], tl.int32)
    if regions is not None:
        seen_from = vector(regions, row, t, inside, 0)
    if TAINT:
        broken = _broken(keys) | _broken(values)
        keys, values = _cleared(keys, broken), _cleared(values, broken)
        b = tl.where(broken & (b != float("-inf")), float("nan"), b)
    return keys, values, b, seen_from


@triton.jit
def group_tiles(key, value, bias, regions, row, head, first, end, A: tl.constexpr, B: tl.constexpr, TAINT: tl.constexpr,
                D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
                ACC: tl.constexpr):  # fmt: skip
    """All keys of a group of short streams, which lie side by side from `first` to `end`: one tile, or two."""
    a = key_tile(key, value, bias, regions, row, head, first, end, A, TAINT, D, PARTS, UNIT, ACC)
    if B == 0:
        return (a,)
    else:
        return a, key_tile(key, value, bias, regions, row, head, first + A, end, B, TAINT, D, PARTS, UNIT, ACC)


@triton.jit
def resident_images(key, value, bias, row, head, IMAGES: tl.constexpr, TAINT: tl.constexpr, D: tl.constexpr,
                    PARTS: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The tiles of all groups of image streams, none of which is long."""
    found = ()
    for g in tl.static_range(len(IMAGES)):
        found = found + (group_tiles(key, value, bias, None, row, head, IMAGES[g][1], IMAGES[g][6], IMAGES[g][3],
                                     IMAGES[g][4], TAINT, D, PARTS, UNIT, ACC),)  # fmt: skip
    return found


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
def plus(a, b):
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def weighed(parts, w):
    """As scaled, but by selection where the factor is 0: that silences NaN too."""
    off = (w == 0)[:, None]
    first = tl.where(off, 0.0, parts[0] * w[:, None])
    if len(parts) == 1:
        return (first,)
    else:
        return first, tl.where(off, 0.0, parts[1] * w[:, None])


@triton.jit
def scale_of(high, low, EXACT: tl.constexpr, ACC: tl.constexpr):
    """The factor of scores in powers of two, as one number, or two that are its exact sum.

    A factor that is rounded errs the same way in every score, which shows in float32 results.
    """
    if ACC == tl.float64:
        return (tl.cast(high, ACC) + tl.cast(low, ACC),)
    elif EXACT:
        return tl.cast(high, ACC), tl.cast(low, ACC)
    else:
        return (tl.cast(high, ACC),)


@triton.jit
def times(s, scale):
    if len(scale) == 1:
        return s * scale[0]
    else:
        return s * scale[0] + s * scale[1]


@triton.jit
def scores(q, tile, scale, pixel_regions, BIASED: tl.constexpr, REGIONS: tl.constexpr, ACC: tl.constexpr):
    """Scores in powers of two [BM, KT]; -inf where a key is not seen, NaN where a broken one is.

    BIASED: the tile's bias may be other than 0.
    """
    keys, _, bias, seen_from = tile
    s = times(product(q, keys, tl.zeros([q[0].shape[0], keys[0].shape[0]], ACC)), scale)
    if BIASED:
        s += bias[None]
    if REGIONS:
        s = tl.where((pixel_regions[:, None] & seen_from[None]) == 0, float("-inf"), s)
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
def segment(t, start, length):
    """Which of a tile's keys t belong to one of the streams in it."""
    return ((t >= start) & (t < start + length))[None]


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


@triton.jit
def asked_tokens(token, key, image_key, key_bias, image_key_bias, key_regions, row, head, keys,
           IMAGE_KEYS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
           ACC: tl.constexpr):  # fmt: skip
    """A chunk of read-out tokens: their keys, bias and regions, and their numbers among text and image keys.

    The bias is -inf where nothing is read, and NaN where there is no such key.
    """
    index = token - keys
    of_text, of_image = (token >= 0) & (token < keys), (token >= keys) & (index < IMAGE_KEYS)
    t = tl.where(of_text, token, 0).to(tl.int64)
    found = load_rows(key, row, head, t, of_text, D, PARTS, UNIT)
    bias = tl.where(token == -1, float("-inf"), tl.where(of_text | of_image, 0.0, float("nan"))).to(ACC)
    if key_bias is not None:
        bias += vector(key_bias, row, t, of_text, 0.0).to(ACC) * LOG2E
    if IMAGE_KEYS:
        i = tl.where(of_image, index, 0).to(tl.int64)
        found = plus(found, load_rows(image_key, row, head, i, of_image, D, PARTS, UNIT))
        if image_key_bias is not None:
            bias += vector(image_key_bias, row, i, of_image, 0.0).to(ACC) * LOG2E
    seen_from = tl.where(of_text, 0, -1)
    if key_regions is not None:
        seen_from = vector(key_regions, row, t, of_text, 0)
    return found, bias, seen_from, of_text, index


@triton.jit
def stream_of(index, ENDS: tl.constexpr):
    """The number of the image stream that each image key lies in."""
    stream = tl.zeros_like(index)
    for j in tl.static_range(len(ENDS)):
        stream += (index >= ENDS[j]).to(tl.int32)
    return stream


@triton.jit
def column_values(q, asked, top, share, pixel_regions, scale, REGIONS: tl.constexpr, ACC: tl.constexpr):
    """A chunk of columns of P [BM, 16]: the tokens' scores once more, under the softmax of their streams."""
    keys, bias, seen_from, of_text, _ = asked
    s = product(q, keys, tl.zeros([q[0].shape[0], READ], ACC))
    p = tl.exp2(times(s, scale) + (bias[None] - top)) * share
    if REGIONS:
        p = tl.where(of_text[None] & ((pixel_regions[:, None] & seen_from[None]) == 0), 0.0, p)
    return p
