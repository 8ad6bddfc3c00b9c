"""Localized attention backward: a pass over the pixels, a pass over the keys, and a sum.

The first pass goes pixel by pixel: each stream's softmax again, the queries' gradient, and what the keys' gradients
need of it. The second goes key by key over a share of the pixels. Nothing is added up by atomics: the last kernel
sums the shares in a fixed order.

With g the gradient of out, w = 1 for text, and r h the gradient of a read-out column:

    dP = w g V^T + r h,   delta = sum_t P dP,   dz = P (dP - delta)
    dq = scale dz K,   dK = scale dz^T q,   dV = (w P)^T g,   dw = g . (P V)
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, whose types are not Python's.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..launching import dot
from .triton_tiles import (
    LN2,
    READ,
    asked_tokens,
    column_values,
    finite,
    group_tiles,
    inverse,
    key_tile,
    load_rows,
    place,
    product,
    scale_of,
    scaled,
    scores,
    segment,
    spread,
    store_rows,
    stream_of,
    stream_weight,
    vector,
    zeros,
)


class Reads(NamedTuple):
    """The gradient of what was read out, each tensor with its strides.

    KIND: 0 nothing, 1 columns [B, H, N, M], 2 sums [B, H, M], whose `grad_n` is 0. One level deep, since Triton 3.6
    loses a stride of 1 in a tuple in a tuple.
    """

    grad: Any
    grad_b: int
    grad_h: int
    grad_n: int
    grad_m: int
    weights: Any  # [B, N, M]
    weights_b: int
    weights_n: int
    weights_m: int
    tokens: Any  # [B, M]
    tokens_b: int
    tokens_m: int
    size: int  # M


class Slopes(NamedTuple):
    """What the first pass tells the second, [B, H, 1 + I, N] in the accumulation dtype."""

    top: Any  # the largest score
    share: Any  # 1 / sum, 0 where a stream plays no part
    delta: Any
    streams: int  # 1 + I


@triton.jit
def _upstream(reads, row, head, pixel, inside, first, ACC: tl.constexpr):
    """h of a chunk of read-out columns [BM, 16]."""
    m = first + tl.arange(0, READ)
    at = row * reads.grad_b + head * reads.grad_h + pixel[:, None] * reads.grad_n + m[None] * reads.grad_m
    return tl.load(reads.grad + at, mask=inside[:, None] & (m < reads.size)[None], other=0.0).to(ACC)


@triton.jit
def _tokens(reads, row, first):
    m = first + tl.arange(0, READ)
    return tl.load(reads.tokens + row * reads.tokens_b + m * reads.tokens_m, mask=m < reads.size, other=-1)


@triton.jit
def _wanted(reads, row, head, pixel, inside, first, KIND: tl.constexpr, ACC: tl.constexpr):
    """r h of a chunk of read-out columns [BM, 16]."""
    found = _upstream(reads, row, head, pixel, inside, first, ACC)
    if KIND == 2:
        m = first + tl.arange(0, READ)
        at = row * reads.weights_b + pixel[:, None] * reads.weights_n + m[None] * reads.weights_m
        found *= tl.load(reads.weights + at, mask=inside[:, None] & (m < reads.size)[None], other=0.0).to(ACC)
    return found


@triton.jit
def ask(dp, reads, row, head, pixel, inside, key, FLIPPED: tl.constexpr, KIND: tl.constexpr,
         ONE_READ: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """dP with what is asked of the read-out columns among the keys `key`; FLIPPED: dP is [KT, BM]."""
    if KIND != 0:
        for first in range(0, READ if ONE_READ else reads.size, READ):
            token = _tokens(reads, row, first)
            wanted = _wanted(reads, row, head, pixel, inside, first, KIND, ACC)
            if FLIPPED:
                dp = dot((key[:, None] == token[None]).to(ACC), tl.trans(wanted), dp)
            else:
                dp = dot(wanted, (token[:, None] == key[None]).to(ACC), dp)
    return dp


@triton.jit
def _pull(g, tile, w, reads, row, head, pixel, inside, number, WEIGHED: tl.constexpr, GRAD: tl.constexpr,
          KIND: tl.constexpr, ONE_READ: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """g V^T and dP of one tile [BM, KT]; `number` is its first key's among the read-out tokens."""
    values = tile[1]
    SIZE: tl.constexpr = values[0].shape[0]
    plain = tl.zeros([pixel.shape[0], SIZE], ACC)
    if GRAD:
        plain = product(g, values, plain)
    dp = plain
    if WEIGHED:
        dp = dp * w[:, None]
    key = number + tl.arange(0, SIZE)
    return plain, ask(dp, reads, row, head, pixel, inside, key, False, KIND, ONE_READ, ACC)


@triton.jit
def _live(w, reads, row, first, end, KIND: tl.constexpr):
    """Where a weighted stream plays a part; elsewhere even its NaN is not looked at."""
    live = w != 0
    if KIND != 0:
        count = 0
        for start in range(0, reads.size, READ):
            token = _tokens(reads, row, start)
            count += tl.sum(((token >= first) & (token < end)).to(tl.int32), 0)
        live = live | (count > 0)
    return live


@triton.jit
def _keep(slopes, row, head, heads, stream, pixel, pixels, inside, live, top, share, slope):
    at = ((row * heads + head) * slopes.streams + stream) * pixels + pixel
    tl.store(slopes.top + at, top, mask=inside)
    tl.store(slopes.share + at, tl.where(live, share, 0.0), mask=inside)
    tl.store(slopes.delta + at, slope, mask=inside)


@triton.jit
def _keep_weight(dweights, row, head, heads, images, image, tile, tiles, pixel, pixels, inside, w, plain,
                 PER_PIXEL: tl.constexpr):  # fmt: skip
    """One head's dw = g . (P V), also where w is 0; [B, I, H, N], or each tile's sum [B, I, H, tiles]."""
    broken = (plain != plain) | (tl.abs(plain) == float("inf"))
    plain = tl.where((w == 0) & broken, 0.0, plain)
    at = (row * images + image) * heads + head
    if PER_PIXEL:
        tl.store(dweights + at * pixels + pixel, plain, mask=inside)
    else:
        tl.store(dweights + at * tiles + tile, tl.sum(tl.where(inside, plain, 0.0), 0))


@triton.jit
def _measure(state, q, g, tile, scale, pixel_regions, w, reads, row, head, pixel, inside, number,
             BIASED: tl.constexpr, REGIONS: tl.constexpr, WEIGHED: tl.constexpr, GRAD: tl.constexpr,
             KIND: tl.constexpr, ONE_READ: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A running softmax (largest score, sum, sum of P g V^T, sum of P dP) after one more tile."""
    top, total, plain, slope = state
    s = scores(q, tile, scale, pixel_regions, BIASED, REGIONS, ACC)
    gv, dp = _pull(g, tile, w, reads, row, head, pixel, inside, number, WEIGHED, GRAD, KIND, ONE_READ, ACC)
    new = tl.maximum(top, tl.max(s, 1))
    base = finite(new)
    fade = tl.exp2(top - base)
    p = tl.exp2(s - base[:, None])
    return new, total * fade + tl.sum(p, 1), plain * fade + tl.sum(p * gv, 1), slope * fade + tl.sum(p * dp, 1)


@triton.jit
def _descend(dq, q, g, tile, scale, pixel_regions, w, live, top, share, slope, reads, row, head, pixel, inside, number,
             BIASED: tl.constexpr, REGIONS: tl.constexpr, WEIGHED: tl.constexpr, GRAD: tl.constexpr,
             KIND: tl.constexpr, ONE_READ: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """dq / scale with what comes through one tile. In a short stream the products are those just made."""
    s = scores(q, tile, scale, pixel_regions, BIASED, REGIONS, ACC)
    _, dp = _pull(g, tile, w, reads, row, head, pixel, inside, number, WEIGHED, GRAD, KIND, ONE_READ, ACC)
    dz = tl.exp2(s - top[:, None]) * share[:, None] * (dp - slope[:, None])
    if WEIGHED:
        dz = tl.where(live[:, None], dz, 0.0)
    return spread(dz, tile[0], dq)


@triton.jit
def _stream(dq, q, g, key, value, bias, regions, tiles, scale, pixel_regions, w, live, reads, row, head, pixel, inside,
            first, end, number, LONG: tl.constexpr, BLOCK: tl.constexpr, WEIGHED: tl.constexpr,
            GRAD: tl.constexpr, KIND: tl.constexpr, ONE_READ: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
            UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One stream: dq / scale with it, and its (largest score, 1 / sum, g . (P V), delta)."""
    REGIONS: tl.constexpr = regions is not None
    TAINT: tl.constexpr = REGIONS or WEIGHED
    BIASED: tl.constexpr = TAINT or bias is not None
    BM: tl.constexpr = pixel.shape[0]
    state = (tl.full([BM], float("-inf"), ACC), tl.zeros([BM], ACC), tl.zeros([BM], ACC), tl.zeros([BM], ACC))
    if LONG:
        for start in range(first, end, BLOCK):
            tile = key_tile(key, value, bias, regions, row, head, start, end, BLOCK, TAINT, D, PARTS, UNIT, ACC)
            state = _measure(state, q, g, tile, scale, pixel_regions, w, reads, row, head, pixel, inside,
                             number + start, True, REGIONS, WEIGHED, GRAD, KIND, ONE_READ, ACC)  # fmt: skip
    else:
        state = _measure(state, q, g, tiles[0], scale, pixel_regions, w, reads, row, head, pixel, inside,
                         number + first, BIASED or len(tiles) == 1, REGIONS, WEIGHED, GRAD, KIND, ONE_READ,
                         ACC)  # fmt: skip
        if len(tiles) == 2:
            state = _measure(state, q, g, tiles[1], scale, pixel_regions, w, reads, row, head, pixel, inside,
                             number + first + tiles[0][2].shape[0], True, REGIONS, WEIGHED, GRAD, KIND, ONE_READ,
                             ACC)  # fmt: skip
    top, total, plain, slope = state
    top, share = finite(top), inverse(total)
    plain, slope = plain * share, slope * share
    if LONG:
        for start in range(first, end, BLOCK):
            tile = key_tile(key, value, bias, regions, row, head, start, end, BLOCK, TAINT, D, PARTS, UNIT, ACC)
            dq = _descend(dq, q, g, tile, scale, pixel_regions, w, live, top, share, slope, reads, row, head, pixel,
                          inside, number + start, True, REGIONS, WEIGHED, GRAD, KIND, ONE_READ, ACC)  # fmt: skip
    else:
        dq = _descend(dq, q, g, tiles[0], scale, pixel_regions, w, live, top, share, slope, reads, row, head, pixel,
                      inside, number + first, BIASED or len(tiles) == 1, REGIONS, WEIGHED, GRAD, KIND, ONE_READ,
                      ACC)  # fmt: skip
        if len(tiles) == 2:
            dq = _descend(dq, q, g, tiles[1], scale, pixel_regions, w, live, top, share, slope, reads, row, head,
                          pixel, inside, number + first + tiles[0][2].shape[0], True, REGIONS, WEIGHED, GRAD, KIND,
                          ONE_READ, ACC)  # fmt: skip
    return dq, (top, share, plain, slope)


@triton.jit
def _packed(dq, q, g, tile, weights, dweights, slopes, scale, reads, row, head, heads, pixel, pixels, inside, block,
            blocks, first, stream, images, number, LENGTHS: tl.constexpr, OFFSET: tl.constexpr, COUNT: tl.constexpr,
            PER_PIXEL: tl.constexpr,
            GRAD: tl.constexpr, KIND: tl.constexpr, ONE_READ: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """dq / scale with several short image streams in one tile, each under a softmax of its own."""
    s = scores(q, tile, scale, pixel, True, False, ACC)
    t = tl.arange(0, s.shape[1])
    tops, shares, slope_of, weight_of = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    found = ()
    start = 0
    for j in tl.static_range(COUNT):
        mine = segment(t, start, LENGTHS[OFFSET + j])
        found = found + (finite(tl.max(tl.where(mine, s, float("-inf")), 1)),)
        tops = tl.where(mine, found[j][:, None], tops)
        if weights is not None:
            weight_of = tl.where(mine, stream_weight(weights, row, stream + j, pixel, inside, ACC)[:, None], weight_of)
        start += LENGTHS[OFFSET + j]
    p = tl.exp2(s - tops)
    gv, _ = _pull(g, tile, pixel, reads, row, head, pixel, inside, number, False, GRAD, 0, ONE_READ, ACC)
    dp = gv
    if weights is not None:
        dp = dp * weight_of
    dp = ask(dp, reads, row, head, pixel, inside, number + t, False, KIND, ONE_READ, ACC)
    start = 0
    for j in tl.static_range(COUNT):
        mine = segment(t, start, LENGTHS[OFFSET + j])
        share = inverse(tl.sum(tl.where(mine, p, 0.0), 1))
        slope = tl.sum(tl.where(mine, p * dp, 0.0), 1) * share
        live = inside
        if weights is not None:
            w = stream_weight(weights, row, stream + j, pixel, inside, ACC)
            live = _live(w, reads, row, number + start, number + start + LENGTHS[OFFSET + j], KIND)
            if dweights is not None:
                plain = tl.sum(tl.where(mine, p * gv, 0.0), 1) * share
                _keep_weight(dweights, row, head, heads, images, stream + j, block, blocks, pixel, pixels, inside, w,
                             plain, PER_PIXEL)  # fmt: skip
        _keep(slopes, row, head, heads, 1 + stream + j, pixel, pixels, inside, live, found[j], share, slope)
        shares = tl.where(mine, tl.where(live, share, 0.0)[:, None], shares)
        slope_of = tl.where(mine, slope[:, None], slope_of)
        start += LENGTHS[OFFSET + j]
    dz = tl.where(shares == 0, 0.0, p * shares * (dp - slope_of))
    return spread(dz, tile[0], dq)


@triton.jit
def _images(dq, q, g, key, value, bias, weights, dweights, slopes, scale, reads, row, head, heads, pixel, pixels,
            inside, block, blocks, images, number, start, end, stream, LONG: tl.constexpr, A: tl.constexpr,
            B: tl.constexpr, LENGTHS: tl.constexpr, OFFSET: tl.constexpr, COUNT: tl.constexpr,
            PER_PIXEL: tl.constexpr, BLOCK: tl.constexpr,
            GRAD: tl.constexpr, KIND: tl.constexpr, ONE_READ: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
            UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """dq / scale with one group of image streams."""
    WEIGHED: tl.constexpr = weights is not None
    tiles = ()
    if not LONG:
        tiles = group_tiles(key, value, bias, None, row, head, start, end, A, B, WEIGHED, D, PARTS, UNIT, ACC)
    if COUNT > 1:
        return _packed(dq, q, g, tiles[0], weights, dweights, slopes, scale, reads, row, head, heads, pixel, pixels,
                       inside, block, blocks, start, stream, images, number + start, LENGTHS, OFFSET, COUNT,
                       PER_PIXEL, GRAD, KIND,
                       ONE_READ, ACC)  # fmt: skip
    else:
        w, live = pixel, inside
        if WEIGHED:
            w = stream_weight(weights, row, stream, pixel, inside, ACC)
            live = _live(w, reads, row, number + start, number + end, KIND)
        dq, found = _stream(dq, q, g, key, value, bias, None, tiles, scale, pixel, w, live, reads, row, head, pixel,
                            inside, start, end, number, LONG, BLOCK, WEIGHED, GRAD, KIND, ONE_READ, D,
                            PARTS, UNIT, ACC)  # fmt: skip
        top, share, plain, slope = found
        _keep(slopes, row, head, heads, 1 + stream, pixel, pixels, inside, live, top, share, slope)
        if dweights is not None:
            _keep_weight(dweights, row, head, heads, images, stream, block, blocks, pixel, pixels, inside, w, plain,
                         PER_PIXEL)  # fmt: skip
        return dq


@triton.jit
def localized_attention_bwd_pixel_kernel(
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
    dquery,  # [B, N, H, D]
    dweights,  # [B, I, H, N or tiles]
    dtoken_weights,  # [B, H, N, M]
    slopes,
    pixels,
    keys,
    heads,
    groups,
    per_group,
    equal_groups,
    scale_high,
    scale_low,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    TEXT: tl.constexpr,  # "short", "long" or "none"
    A: tl.constexpr,
    B: tl.constexpr,
    IMAGES: tl.constexpr,
    LENGTHS: tl.constexpr,
    EQUAL: tl.constexpr,
    ENDS: tl.constexpr,  # the number behind the last key of each image stream but the last
    IMAGE_KEYS: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    GRAD: tl.constexpr,
    KIND: tl.constexpr,
    ONE_READ: tl.constexpr,
    ACC: tl.constexpr,
):
    """The queries' gradient, each head's share of the weights', and the slopes."""
    row, head, group = place(groups, heads)
    REGIONS: tl.constexpr = query_regions is not None
    scale = scale_of(scale_high, scale_low, True, ACC)
    plain_scale = (tl.cast(scale_high, ACC) + tl.cast(scale_low, ACC)) * LN2
    blocks = tl.cdiv(pixels, BM)
    for block in range(group * per_group, tl.minimum(blocks, (group + 1) * per_group)):
        pixel = (block * BM + tl.arange(0, BM)).to(tl.int64)
        inside = pixel < pixels
        q = load_rows(query, row, head, pixel, inside, D, PARTS, UNIT)
        g = q
        if GRAD:
            g = load_rows(grad, row, head, pixel, inside, D, PARTS, UNIT)
        pixel_regions = tl.zeros([BM], tl.int32)
        if REGIONS:
            pixel_regions = vector(query_regions, row, pixel, inside, 0)
        dq = zeros(BM, PARTS, ACC)
        if TEXT != "none":
            tiles = ()
            if TEXT == "short":
                tiles = group_tiles(key, value, key_bias, key_regions, row, head, 0, keys, A, B, REGIONS, D, PARTS,
                                    UNIT, ACC)  # fmt: skip
            dq, found = _stream(dq, q, g, key, value, key_bias, key_regions, tiles, scale, pixel_regions, pixel, inside,
                                reads, row, head, pixel, inside, 0, keys, 0, TEXT == "long", BLOCK, False, GRAD, KIND,
                                ONE_READ, D, PARTS, UNIT, ACC)  # fmt: skip
            top, share, _, slope = found
            _keep(slopes, row, head, heads, 0, pixel, pixels, inside, inside, top, share, slope)
        if EQUAL > 0:
            keys_of = EQUAL * LENGTHS[0]
            for i in range(0, equal_groups):
                dq = _images(dq, q, g, image_key, image_value, image_key_bias, image_weights, dweights, slopes, scale,
                             reads, row, head, heads, pixel, pixels, inside, block, blocks, slopes.streams - 1, keys,
                             i * keys_of, (i + 1) * keys_of, i * EQUAL, False, 16, 0, LENGTHS, 0, EQUAL, PER_PIXEL,
                             BLOCK, GRAD, KIND, ONE_READ, D, PARTS, UNIT, ACC)  # fmt: skip
        for i in tl.static_range(len(IMAGES)):
            dq = _images(dq, q, g, image_key, image_value, image_key_bias, image_weights, dweights, slopes, scale,
                         reads, row, head, heads, pixel, pixels, inside, block, blocks, slopes.streams - 1, keys,
                         IMAGES[i][1], IMAGES[i][6], IMAGES[i][2], IMAGES[i][0], IMAGES[i][3], IMAGES[i][4], LENGTHS,
                         IMAGES[i][5], IMAGES[i][7], PER_PIXEL, BLOCK, GRAD, KIND, ONE_READ, D, PARTS, UNIT,
                         ACC)  # fmt: skip
        if dquery is not None:
            store_rows(dquery, row, pixels, head, heads, pixel, inside, scaled(dq, tl.zeros([BM], ACC) + plain_scale),
                       D, PARTS)  # fmt: skip
    if dtoken_weights is not None:
        tl.debug_barrier()  # the slopes are read again, by other threads than wrote them
        for block in range(group * per_group, tl.minimum(blocks, (group + 1) * per_group)):
            pixel = (block * BM + tl.arange(0, BM)).to(tl.int64)
            inside = pixel < pixels
            q = load_rows(query, row, head, pixel, inside, D, PARTS, UNIT)
            pixel_regions = tl.zeros([BM], tl.int32)
            if REGIONS:
                pixel_regions = vector(query_regions, row, pixel, inside, 0)
            for first in range(0, READ if ONE_READ else reads.size, READ):
                asked = asked_tokens(_tokens(reads, row, first), key, image_key, key_bias, image_key_bias, key_regions,
                                     row, head, keys, IMAGE_KEYS, D, PARTS, UNIT, ACC)  # fmt: skip
                _, bias, seen_from, of_text, index = asked
                stream = tl.where(of_text, 0, 1 + stream_of(index, ENDS))
                at = ((row * heads + head) * slopes.streams + stream[None]) * pixels + pixel[:, None]
                read = (bias != float("-inf")) & (bias == bias)
                mask = inside[:, None] & read[None]
                top = tl.load(slopes.top + at, mask=mask, other=0.0)
                share = tl.load(slopes.share + at, mask=mask, other=0.0)
                p = column_values(q, asked, top, share, pixel_regions, scale, REGIONS, ACC)
                h = _upstream(reads, row, head, pixel, inside, first, ACC)
                m = first + tl.arange(0, READ)
                at = ((row * heads + head) * pixels + pixel[:, None]) * reads.size + m[None]
                tl.store(dtoken_weights + at, tl.where(read[None], h * p, 0.0),
                         mask=inside[:, None] & (m < reads.size)[None])  # fmt: skip
