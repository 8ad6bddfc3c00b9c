"""The second and third kernel of localized attention's backward: the keys' gradients, and the sums of shares.

A program has a chunk of keys and a share of the pixels; what it needs of each pixel's softmax, the first kernel left.
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, whose types are not Python's.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_backward import ask
from .triton_tiles import (
    LN2,
    key_tile,
    load_rows,
    product,
    scale_of,
    scaled,
    spread,
    store_rows,
    stream_of,
    times,
    vector,
    zeros,
)  # fmt: skip


class Sum(NamedTuple):
    """One of the last kernel's sums: source [R1, P, R2, Q], result [P, Q]."""

    source: Any
    result: Any
    r1: int
    p: int
    r2: int
    q: int


@triton.jit
def _gain(state, tile, q, g, top, share, delta, w, scale, pixel_regions, reads, row, head, pixel, inside, number,
          REGIONS: tl.constexpr, WEIGHED: tl.constexpr, GRAD: tl.constexpr, KIND: tl.constexpr,
          ONE_READ: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """(dK / scale, dV, dbias) of one tile of keys with what comes from one tile of pixels; scores are [KT, BM]."""
    dk, dv, db = state
    keys, values, bias, seen_from = tile
    SIZE: tl.constexpr = keys[0].shape[0]
    BM: tl.constexpr = pixel.shape[0]
    s = times(product(keys, q, tl.zeros([SIZE, BM], ACC)), scale) + bias[:, None]
    if REGIONS:
        s = tl.where((seen_from[:, None] & pixel_regions[None]) == 0, float("-inf"), s)
    # A key that is not seen, or a stream that plays no part, is selected away: the slopes of the pixel may be NaN.
    shown = (s != float("-inf")) & (share != 0)
    p = tl.where(shown, tl.exp2(s - top) * share, 0.0)
    dp = tl.zeros([SIZE, BM], ACC)
    if GRAD:
        dp = product(values, g, dp)
        if WEIGHED:
            dp = dp * w
            dv = spread(tl.where(w == 0, 0.0, p * w), g, dv)
        else:
            dv = spread(p, g, dv)
    dp = ask(dp, reads, row, head, pixel, inside, number + tl.arange(0, SIZE), True, KIND, ONE_READ, ACC)
    dz = tl.where(shown, p * (dp - delta), 0.0)
    return spread(dz, q, dk), dv, db + tl.sum(dz, 1)


@triton.jit
def _store_gain(state, dkey, dvalue, dbias, share, row, rows, head, heads, first, keys, scale, D: tl.constexpr,
                PARTS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A share of the gradients of keys and values [shares, B, T, H, D] and of the bias [shares, B, H, T]."""
    dk, dv, db = state
    SIZE: tl.constexpr = db.shape[0]
    t = (first + tl.arange(0, SIZE)).to(tl.int64)
    inside = t < keys
    if dkey is not None:
        scaled_dk = scaled(dk, tl.zeros([SIZE], ACC) + scale)
        store_rows(dkey, share * rows + row, keys, head, heads, t, inside, scaled_dk, D, PARTS)
    if dvalue is not None:
        store_rows(dvalue, share * rows + row, keys, head, heads, t, inside, dv, D, PARTS)
    if dbias is not None:
        tl.store(dbias + ((share * rows + row) * heads + head) * keys + t, db.to(dbias.dtype.element_ty), mask=inside)


@triton.jit
def _text_chunk(query, key, value, key_bias, query_regions, key_regions, grad, reads, slopes, dkey, dvalue, dbias, row,
                head, rows, heads, pixels, keys, first, share, low, high, scale, plain_scale, D: tl.constexpr,
                PARTS: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
                GRAD: tl.constexpr, KIND: tl.constexpr, ONE_READ: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    REGIONS: tl.constexpr = query_regions is not None
    a = key_tile(key, value, key_bias, key_regions, row, head, first, keys, A, REGIONS, D, PARTS, UNIT, ACC)
    gains = (zeros(A, PARTS, ACC), zeros(A, PARTS, ACC), tl.zeros([A], ACC))
    if B > 0:
        b = key_tile(key, value, key_bias, key_regions, row, head, first + A, keys, B, REGIONS, D, PARTS, UNIT, ACC)
        more = (zeros(B, PARTS, ACC), zeros(B, PARTS, ACC), tl.zeros([B], ACC))
    for block in range(low, high):
        pixel = (block * BM + tl.arange(0, BM)).to(tl.int64)
        inside = pixel < pixels
        q = load_rows(query, row, head, pixel, inside, D, PARTS, UNIT)
        g = q
        if GRAD:
            g = load_rows(grad, row, head, pixel, inside, D, PARTS, UNIT)
        pixel_regions = pixel
        if REGIONS:
            pixel_regions = vector(query_regions, row, pixel, inside, 0)
        at = (row * heads + head) * slopes.streams * pixels + pixel
        top = tl.load(slopes.top + at, mask=inside, other=0.0)[None]
        part = tl.load(slopes.share + at, mask=inside, other=0.0)[None]
        delta = tl.load(slopes.delta + at, mask=inside, other=0.0)[None]
        gains = _gain(gains, a, q, g, top, part, delta, top, scale, pixel_regions, reads, row, head, pixel, inside,
                      first, REGIONS, False, GRAD, KIND, ONE_READ, ACC)  # fmt: skip
        if B > 0:
            more = _gain(more, b, q, g, top, part, delta, top, scale, pixel_regions, reads, row, head, pixel, inside,
                         first + A, REGIONS, False, GRAD, KIND, ONE_READ, ACC)  # fmt: skip
    _store_gain(gains, dkey, dvalue, dbias, share, row, rows, head, heads, first, keys, plain_scale, D, PARTS, ACC)
    if B > 0:
        _store_gain(more, dkey, dvalue, dbias, share, row, rows, head, heads, first + A, keys, plain_scale, D, PARTS,
                    ACC)  # fmt: skip


@triton.jit
def _image_chunk(query, key, value, bias, weights, grad, reads, slopes, dkey, dvalue, dbias, row, head, rows, heads,
                 pixels, keys, number, first, share, low, high, scale, plain_scale, D: tl.constexpr,
                 PARTS: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr, ENDS: tl.constexpr,
                 GRAD: tl.constexpr, KIND: tl.constexpr, ONE_READ: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Keys of several streams, perhaps: each finds its own stream's slopes and weight."""
    WEIGHED: tl.constexpr = weights is not None
    tile = key_tile(key, value, bias, None, row, head, first, keys, SIZE, WEIGHED, D, PARTS, UNIT, ACC)
    t = first + tl.arange(0, SIZE)
    known = t < keys
    stream = stream_of(t, ENDS)
    own = (((row * heads + head) * slopes.streams + 1 + stream) * pixels)[:, None]
    gains = (zeros(SIZE, PARTS, ACC), zeros(SIZE, PARTS, ACC), tl.zeros([SIZE], ACC))
    for block in range(low, high):
        pixel = (block * BM + tl.arange(0, BM)).to(tl.int64)
        inside = pixel < pixels
        q = load_rows(query, row, head, pixel, inside, D, PARTS, UNIT)
        g = q
        if GRAD:
            g = load_rows(grad, row, head, pixel, inside, D, PARTS, UNIT)
        both = known[:, None] & inside[None]
        top = tl.load(slopes.top + own + pixel[None], mask=both, other=0.0)
        part = tl.load(slopes.share + own + pixel[None], mask=both, other=0.0)
        delta = tl.load(slopes.delta + own + pixel[None], mask=both, other=0.0)
        w = part
        if WEIGHED:
            at = weights.data + row * weights.b + stream[:, None].to(tl.int64) * weights.i + pixel[None] * weights.n
            w = tl.load(at, mask=both, other=0.0).to(ACC)
        gains = _gain(gains, tile, q, g, top, part, delta, w, scale, pixel, reads, row, head, pixel, inside,
                      number + first, False, WEIGHED, GRAD, KIND, ONE_READ, ACC)  # fmt: skip
    _store_gain(gains, dkey, dvalue, dbias, share, row, rows, head, heads, first, keys, plain_scale, D, PARTS, ACC)


@triton.jit
def localized_attention_bwd_key_kernel(
    query,  # [B, N, H, D]
    key,  # [B, T, H, D]
    value,  # [B, T, H, D]
    key_bias,  # [B, T]
    query_regions,  # [B, N]
    key_regions,  # [B, T]
    image_key,  # [B, sum(L), H, D]
    image_value,  # [B, sum(L), H, D]
    image_key_bias,  # [B, sum(L)]
    image_weights,  # [B, I] or [B, I, N]
    grad,  # [B, N, H, D]
    reads,
    slopes,
    dkey,  # [shares, B, T, H, D]
    dvalue,  # [shares, B, T, H, D]
    dbias,  # [shares, B, H, T]
    dimage_key,  # [shares, B, sum(L), H, D]
    dimage_value,  # [shares, B, sum(L), H, D]
    dimage_bias,  # [shares, B, H, sum(L)]
    pixels,
    keys,
    image_keys,
    rows,
    heads,
    chunks,
    text_chunks,
    per_share,
    scale_high,
    scale_low,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    IMAGE: tl.constexpr,
    ENDS: tl.constexpr,
    GRAD: tl.constexpr,
    KIND: tl.constexpr,
    ONE_READ: tl.constexpr,
    ACC: tl.constexpr,
):
    """A share of the gradients of one chunk of keys: text first, then images, whatever the streams' bounds."""
    chunk, share = tl.program_id(0) % chunks, tl.program_id(1)
    both = tl.program_id(0) // chunks
    row, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    scale = scale_of(scale_high, scale_low, True, ACC)
    plain_scale = (tl.cast(scale_high, ACC) + tl.cast(scale_low, ACC)) * LN2
    blocks = tl.cdiv(pixels, BM)
    low, high = share * per_share, tl.minimum(blocks, (share + 1) * per_share)
    if chunk < text_chunks:
        _text_chunk(query, key, value, key_bias, query_regions, key_regions, grad, reads, slopes, dkey, dvalue, dbias,
                    row, head, rows, heads, pixels, keys, chunk * (A + B), share, low, high, scale, plain_scale, D,
                    PARTS, UNIT, BM, A, B, GRAD, KIND, ONE_READ, ACC)  # fmt: skip
    elif IMAGE > 0:
        _image_chunk(query, image_key, image_value, image_key_bias, image_weights, grad, reads, slopes, dimage_key,
                     dimage_value, dimage_bias, row, head, rows, heads, pixels, image_keys, keys,
                     (chunk - text_chunks) * IMAGE, share, low, high, scale, plain_scale, D, PARTS, UNIT, BM, IMAGE,
                     ENDS, GRAD, KIND, ONE_READ, ACC)  # fmt: skip


@triton.jit
def _add_up(job, block, ACC: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr):
    columns_of = tl.cdiv(job.q, BQ)
    p = (block // columns_of).to(tl.int64)
    q = ((block % columns_of) * BQ + tl.arange(0, BQ)).to(tl.int64)
    total = tl.zeros([BR, BQ], ACC)
    for start in range(0, job.r1 * job.r2, BR):
        r = start + tl.arange(0, BR)
        at = ((r // job.r2 * job.p + p) * job.r2 + r % job.r2)[:, None] * job.q + q[None]
        total += tl.load(job.source + at, mask=(r < job.r1 * job.r2)[:, None] & (q < job.q)[None], other=0.0)
    value = tl.sum(total, 0).to(job.result.dtype.element_ty)
    tl.store(job.result + p * job.q + q, value, mask=q < job.q)


@triton.jit
def localized_attention_bwd_sum_kernel(jobs, ACC: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr):
    """Every job's sum over its two reduced axes, always in the same order."""
    block = tl.program_id(0)
    first = 0
    for j in tl.static_range(len(jobs)):
        last = first + jobs[j].p * tl.cdiv(jobs[j].q, BQ)
        if (block >= first) & (block < last):
            _add_up(jobs[j], block - first, ACC, BR, BQ)
        first = last
