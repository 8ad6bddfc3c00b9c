"""Localized attention forward: one pass over the queries, every stream's softmax on the way.

A program takes several tiles of pixels of one (row, head). Where all keys fit on the chip (RESIDENT) they are
loaded once for all of them. Long streams are taken in blocks of 64 keys under a running softmax; image streams
of at most 16 keys lie several in a tile, and each has a softmax of its own in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LOG2E,
    READ,
    finite,
    inverse,
    key_tile,
    load_columns,
    load_rows,
    place,
    product,
    read_tokens,
    scaled,
    scores,
    spread,
    store_rows,
    stream_weight,
    told,
    zeros,
)


@triton.jit
def tail_tiles(key, value, bias, regions, row, head, first, end, A: tl.constexpr, B: tl.constexpr,
               TAINT: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
               ACC: tl.constexpr):  # fmt: skip
    """A stream's last keys, or all of a short one: one tile, or two."""
    a = key_tile(key, value, bias, regions, row, head, first, end, A, TAINT, D, PARTS, UNIT, ACC)
    if B == 0:
        return (a,)
    else:
        return a, key_tile(key, value, bias, regions, row, head, first + A, end, B, TAINT, D, PARTS, UNIT, ACC)


@triton.jit
def image_tiles(key, value, bias, row, head, IMAGES: tl.constexpr, TAINT: tl.constexpr, D: tl.constexpr,
                PARTS: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The last tiles of every group of image streams."""
    found = ()
    for g in tl.static_range(len(IMAGES)):
        found = found + (image_tail(key, value, bias, row, head, IMAGES[g][0], IMAGES[g][2], IMAGES[g][3],
                                    IMAGES[g][4], IMAGES[g][5], TAINT, D, PARTS, UNIT, ACC),)  # fmt: skip
    return found


@triton.jit
def image_tail(key, value, bias, row, head, START: tl.constexpr, FULL: tl.constexpr, A: tl.constexpr,
               B: tl.constexpr, LENGTHS: tl.constexpr, TAINT: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
               UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    end = START
    for j in tl.static_range(len(LENGTHS)):
        end += LENGTHS[j]
    return tail_tiles(key, value, bias, None, row, head, START + 64 * FULL, end, A, B, TAINT, D, PARTS, UNIT, ACC)


@triton.jit
def absorb(state, q, tiles, scale, pixel_regions, FIRST: tl.constexpr, BIAS: tl.constexpr, REGIONS: tl.constexpr,
           TAINT: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A running softmax (largest score, sum, weighted values) after one or two more tiles; FIRST: after none.

    RAGGED: the last of the tiles may be.
    """
    top, total, out = state
    a = scores(q, tiles[0], scale, pixel_regions, BIAS, REGIONS, TAINT, RAGGED and len(tiles) == 1, ACC)
    new = tl.maximum(top, tl.max(a, 1))
    if len(tiles) == 2:
        b = scores(q, tiles[1], scale, pixel_regions, BIAS, REGIONS, TAINT, RAGGED, ACC)
        new = tl.maximum(new, tl.max(b, 1))
    base = finite(new)
    if not FIRST:
        fade = tl.exp2(top - base)
        total *= fade
        out = scaled(out, fade)
    p = tl.exp2(a - base[:, None])
    total += tl.sum(p, 1)
    out = spread(told(p, a, tiles[0][5], TAINT), tiles[0][1], out)
    if len(tiles) == 2:
        p = tl.exp2(b - base[:, None])
        total += tl.sum(p, 1)
        out = spread(told(p, b, tiles[1][5], TAINT), tiles[1][1], out)
    return new, total, out


@triton.jit
def attend(q, key, value, bias, regions, pixel_regions, row, head, scale, first, full, end, tiles, LOOP: tl.constexpr,
           REGIONS: tl.constexpr, TAINT: tl.constexpr, RAGGED: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
           UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One stream's running softmax: `full` blocks of 64 keys from `first` on, then `tiles`."""
    BM: tl.constexpr = q[0].shape[0]
    state = (tl.full([BM], float("-inf"), ACC), tl.zeros([BM], ACC), zeros(BM, PARTS, ACC))
    if LOOP:
        for block in range(0, full):
            tile = key_tile(key, value, bias, regions, row, head, first + block * 64, end, 64, TAINT, D, PARTS, UNIT,
                            ACC)  # fmt: skip
            state = absorb(state, q, (tile,), scale, pixel_regions, False, bias is not None, REGIONS, TAINT, False, ACC)
    return absorb(state, q, tiles, scale, pixel_regions, not LOOP, bias is not None, REGIONS, TAINT, RAGGED, ACC)


@triton.jit
def segment(t, start, length):
    """Which of a tile's keys t belong to one of the streams in it."""
    return ((t >= start) & (t < start + length))[None]


@triton.jit
def attend_packed(q, tile, weights, row, scale, pixel, inside, STREAM: tl.constexpr, LENGTHS: tl.constexpr,
                  BIAS: tl.constexpr, TAINT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The short streams of one tile: their probabilities times w, and each one's (largest score, 1 / sum)."""
    SIZE: tl.constexpr = tile[2].shape[0]
    s = scores(q, tile, scale, pixel, BIAS, False, TAINT, True, ACC)
    t = tl.arange(0, SIZE)
    tops = tl.zeros([q[0].shape[0], SIZE], ACC)
    start = 0
    found = ()
    for j in tl.static_range(len(LENGTHS)):
        mine = segment(t, start, LENGTHS[j])
        top = finite(tl.max(tl.where(mine, s, float("-inf")), 1))
        tops = tl.where(mine, top[:, None], tops)
        found = found + (top,)
        start += LENGTHS[j]
    p = tl.exp2(s - tops)
    factors = tl.zeros([q[0].shape[0], SIZE], ACC)
    start = 0
    stats = ()
    for j in tl.static_range(len(LENGTHS)):
        mine = segment(t, start, LENGTHS[j])
        share = inverse(tl.sum(tl.where(mine, p, 0.0), 1))
        stats = stats + ((found[j], share),)
        if weights is not None:
            w = stream_weight(weights, row, STREAM + j, pixel, inside, ACC)
            share = tl.where(w == 0, 0.0, w * share)
        factors = tl.where(mine, share[:, None], factors)
        start += LENGTHS[j]
    # By selection, not by multiplication: a weight of 0 silences NaN too.
    p = tl.where(factors == 0, 0.0, told(p, s, tile[5], TAINT) * factors)
    return p, stats


@triton.jit
def add_images(out, stats, q, key, value, bias, weights, row, head, scale, pixel, inside, kept, RESIDENT: tl.constexpr,
               START: tl.constexpr, STREAM: tl.constexpr, FULL: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
               LENGTHS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
               ACC: tl.constexpr):  # fmt: skip
    """out plus one group of image streams; stats plus theirs."""
    TAINT: tl.constexpr = weights is not None
    if RESIDENT:
        tiles = kept
    else:
        tiles = image_tail(key, value, bias, row, head, START, FULL, A, B, LENGTHS, TAINT, D, PARTS, UNIT, ACC)
    if FULL == 0 and B == 0:
        p, more = attend_packed(q, tiles[0], weights, row, scale, pixel, inside, STREAM, LENGTHS, bias is not None,
                                TAINT, ACC)  # fmt: skip
        return spread(p, tiles[0][1], out), stats + more
    else:
        top, total, own = attend(q, key, value, bias, None, pixel, row, head, scale, START, FULL, START + LENGTHS[0],
                                 tiles, FULL > 0, False, TAINT, True, D, PARTS, UNIT, ACC)  # fmt: skip
        share = inverse(total)
        more = ((finite(top), share),)
        if weights is not None:
            w = stream_weight(weights, row, STREAM, pixel, inside, ACC)
            own = scaled(own, share * w)
            first = out[0] + tl.where((w == 0)[:, None], 0.0, own[0])
            if len(PARTS) == 1:
                return (first,), stats + more
            else:
                return (first, out[1] + tl.where((w == 0)[:, None], 0.0, own[1])), stats + more
        else:
            own = scaled(own, share)
            if len(PARTS) == 1:
                return (out[0] + own[0],), stats + more
            else:
                return (out[0] + own[0], out[1] + own[1]), stats + more


@triton.jit
def read_out(q, stats, key, image_key, key_bias, image_key_bias, key_regions, pixel_regions, tokens, row, head, scale,
             keys, first, read, LENGTHS: tl.constexpr, IMAGE_KEYS: tl.constexpr, D: tl.constexpr,
             PARTS: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A chunk of columns of P [BM, 16]: the tokens' scores once more, under the softmax of their streams."""
    token = read_tokens(tokens, row, first, read)
    of_text = (token >= 0) & (token < keys)
    t = tl.where(of_text, token, 0).to(tl.int64)
    s = tl.zeros([q[0].shape[0], READ], ACC)
    bias = tl.zeros([READ], ACC)
    tops = tl.zeros([q[0].shape[0], READ], ACC)
    shares = tl.zeros([q[0].shape[0], READ], ACC)
    s = product(q, load_rows(key, row, head, t, of_text, D, PARTS, UNIT), s)
    if key_bias is not None:
        bias = tl.load(key_bias.data + row * key_bias.b + t * key_bias.n, mask=of_text, other=0.0).to(ACC) * LOG2E
    tops = tl.where(of_text[None], stats[0][0][:, None], tops)
    shares = tl.where(of_text[None], stats[0][1][:, None], shares)
    if IMAGE_KEYS:
        place_in = token - keys
        of_image = (token >= keys) & (place_in < IMAGE_KEYS)
        i = tl.where(of_image, place_in, 0).to(tl.int64)
        s = product(q, load_rows(image_key, row, head, i, of_image, D, PARTS, UNIT), s)
        if image_key_bias is not None:
            at = image_key_bias.data + row * image_key_bias.b + i * image_key_bias.n
            bias += tl.load(at, mask=of_image, other=0.0).to(ACC) * LOG2E
        start = 0
        for j in tl.static_range(len(LENGTHS)):
            mine = (of_image & (place_in >= start) & (place_in < start + LENGTHS[j]))[None]
            tops = tl.where(mine, stats[1 + j][0][:, None], tops)
            shares = tl.where(mine, stats[1 + j][1][:, None], shares)
            start += LENGTHS[j]
    # A product with a column of zeros is NaN where the query is not finite: only what is read may be told.
    hidden = (bias == float("-inf"))[None] | (token < 0)[None]
    if key_regions is not None:
        at = key_regions.data + row * key_regions.b + t * key_regions.n
        regions = tl.load(at, mask=of_text, other=0)
        hidden = hidden | (of_text[None] & ((pixel_regions[:, None] & regions[None]) == 0))
    p = tl.exp2(s * scale + bias[None] - tops) * shares
    p = tl.where(hidden, 0.0, p)
    missing = (token < -1) | (token >= keys + IMAGE_KEYS)
    return tl.where(missing[None], float("nan"), p)


@triton.jit
def localized_attention_fwd_kernel(
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
    tokens,  # [B, M]
    token_weights,  # [B, N, M]
    out,  # [B, N, H, D]
    readout,  # [B, H, N, M], or with token_weights each tile's sums [B, H, tiles, M]
    pixels,
    keys,
    full,
    read,
    heads,
    groups,
    per_group,
    scale_high,
    scale_low,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    LOOP: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    IMAGES: tl.constexpr,
    LENGTHS: tl.constexpr,
    IMAGE_KEYS: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = P V + sum_i w_i P_i V_i, and columns of P or their sums."""
    row, head, group = place(groups, heads)
    REGIONS: tl.constexpr = query_regions is not None
    scale = (tl.cast(scale_high, ACC) + tl.cast(scale_low, ACC)) * LOG2E
    text, images = (), ()
    if RESIDENT:
        if A:
            text = tail_tiles(key, value, key_bias, key_regions, row, head, 64 * full, keys, A, B, REGIONS, D, PARTS,
                              UNIT, ACC)  # fmt: skip
        images = image_tiles(image_key, image_value, image_key_bias, row, head, IMAGES, image_weights is not None, D,
                             PARTS, UNIT, ACC)  # fmt: skip
    tiles = tl.cdiv(pixels, BM)
    for tile in range(group * per_group, tl.minimum(tiles, (group + 1) * per_group)):
        pixel = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        inside = pixel < pixels
        q = load_rows(query, row, head, pixel, inside, D, PARTS, UNIT)
        pixel_regions = tl.zeros([BM], tl.int32)
        if REGIONS:
            at = query_regions.data + row * query_regions.b + pixel * query_regions.n
            pixel_regions = tl.load(at, mask=inside, other=0)
        if A:
            shown = text
            if not RESIDENT:
                shown = tail_tiles(key, value, key_bias, key_regions, row, head, 64 * full, keys, A, B, REGIONS, D,
                                   PARTS, UNIT, ACC)  # fmt: skip
            top, total, acc = attend(q, key, value, key_bias, key_regions, pixel_regions, row, head, scale, 0, full,
                                     keys, shown, LOOP, REGIONS, REGIONS, True, D, PARTS, UNIT, ACC)  # fmt: skip
            share = inverse(total)
            acc = scaled(acc, share)
            stats = ((finite(top), share),)
        else:
            acc = zeros(BM, PARTS, ACC)
            stats = ((tl.zeros([BM], ACC), tl.zeros([BM], ACC)),)
        for g in tl.static_range(len(IMAGES)):
            acc, stats = add_images(
                acc, stats, q, image_key, image_value, image_key_bias, image_weights, row, head, scale, pixel, inside,
                images[g] if RESIDENT else images, RESIDENT, IMAGES[g][0], IMAGES[g][1], IMAGES[g][2], IMAGES[g][3],
                IMAGES[g][4], IMAGES[g][5], D, PARTS, UNIT, ACC,
            )  # fmt: skip
        if readout is not None:
            for first in range(0, read, READ):
                p = read_out(q, stats, key, image_key, key_bias, image_key_bias, key_regions, pixel_regions, tokens,
                             row, head, scale, keys, first, read, LENGTHS, IMAGE_KEYS, D, PARTS, UNIT,
                             ACC)  # fmt: skip
                m = first + tl.arange(0, READ)
                start = readout + (row * heads + head) * tl.cast(pixels, tl.int64) * read
                if token_weights is None:
                    mask = inside[:, None] & (m < read)[None]
                    tl.store(start + pixel[:, None] * read + m[None], p, mask=mask)
                else:
                    start = readout + ((row * heads + head) * tiles + tile) * read
                    r = load_columns(token_weights, row, head, pixel, inside, first, read, ACC)
                    summed = tl.sum(tl.where(inside[:, None], r * p, 0.0), 0)
                    tl.store(start + m, summed, mask=m < read)
        store_rows(out, row, pixels, head, heads, pixel, inside, acc, D, PARTS)
