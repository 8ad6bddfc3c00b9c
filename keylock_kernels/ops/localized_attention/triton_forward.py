"""Localized attention forward: one pass over the queries, every stream's softmax on the way.

A program takes several tiles of pixels of one (row, head). Short streams lie in one or two tiles of keys, image
streams of at most 16 keys several in one tile, each with a softmax of its own in it; where they fit on the chip
(RESIDENT) they are loaded once for all of a program's pixels. Long streams are taken in blocks of keys under a
running softmax.
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, whose types are not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    READ,
    asked_tokens,
    column_values,
    finite,
    group_tiles,
    inverse,
    key_tile,
    load_columns,
    load_rows,
    place,
    plus,
    read_tokens,
    resident_images,
    scale_of,
    scaled,
    scores,
    segment,
    spread,
    store_rows,
    stream_weight,
    vector,
    weighed,
    zeros,
)


@triton.jit
def _absorb(state, q, tile, scale, pixel_regions, REGIONS: tl.constexpr, ACC: tl.constexpr):
    """A running softmax (largest score, sum, weighted values) after one more tile."""
    top, total, out = state
    s = scores(q, tile, scale, pixel_regions, True, REGIONS, ACC)
    new = tl.maximum(top, tl.max(s, 1))
    base = finite(new)
    fade = tl.exp2(top - base)
    p = tl.exp2(s - base[:, None])
    out = spread(p, tile[1], scaled(out, fade))
    return new, total * fade + tl.sum(p, 1), out


@triton.jit
def _attend(q, key, value, bias, regions, pixel_regions, row, head, scale, first, end, TAINT: tl.constexpr,
            BLOCK: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """A long stream, the keys from `first` to `end`: (largest score, 1 / sum), and the values' average."""
    BM: tl.constexpr = q[0].shape[0]
    state = (tl.full([BM], float("-inf"), ACC), tl.zeros([BM], ACC), zeros(BM, PARTS, ACC))
    for start in range(first, end, BLOCK):
        tile = key_tile(key, value, bias, regions, row, head, start, end, BLOCK, TAINT, D, PARTS, UNIT, ACC)
        state = _absorb(state, q, tile, scale, pixel_regions, regions is not None, ACC)
    top, total, out = state
    share = inverse(total)
    return (finite(top), share), scaled(out, share)


@triton.jit
def _weigh(share, p):
    """Probabilities as they meet the values. By selection: a factor of 0 silences NaN too."""
    return tl.where(share == 0, 0.0, p * share)


@triton.jit
def _soften(q, tiles, weights, row, scale, pixel_regions, pixel, inside, stream, LENGTHS: tl.constexpr,
OFFSET: tl.constexpr, COUNT: tl.constexpr,
            BIASED: tl.constexpr, REGIONS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A group of short streams: probabilities times w, tile by tile, and each stream's (largest score, 1 / sum)."""
    if len(tiles) == 2:
        a = scores(q, tiles[0], scale, pixel_regions, BIASED, REGIONS, ACC)
        b = scores(q, tiles[1], scale, pixel_regions, True, REGIONS, ACC)
        top = finite(tl.maximum(tl.max(a, 1), tl.max(b, 1)))
        p, r = tl.exp2(a - top[:, None]), tl.exp2(b - top[:, None])
        share = inverse(tl.sum(p, 1) + tl.sum(r, 1))
        stats = ((top, share),)
        if weights is not None:
            w = stream_weight(weights, row, stream, pixel, inside, ACC)
            share = tl.where(w == 0, 0.0, w * share)
        share = share[:, None]
        return (_weigh(share, p), _weigh(share, r)), stats
    else:
        s = scores(q, tiles[0], scale, pixel_regions, True, REGIONS, ACC)
        if COUNT == 1:
            top = finite(tl.max(s, 1))
            p = tl.exp2(s - top[:, None])
            share = inverse(tl.sum(p, 1))
            stats = ((top, share),)
            if weights is not None:
                w = stream_weight(weights, row, stream, pixel, inside, ACC)
                share = tl.where(w == 0, 0.0, w * share)
            shares = share[:, None]
        else:
            t = tl.arange(0, s.shape[1])
            tops, shares = tl.zeros_like(s), tl.zeros_like(s)
            found, stats = (), ()
            start = 0
            for j in tl.static_range(COUNT):
                mine = segment(t, start, LENGTHS[OFFSET + j])
                found = found + (finite(tl.max(tl.where(mine, s, float("-inf")), 1)),)
                tops = tl.where(mine, found[j][:, None], tops)
                start += LENGTHS[OFFSET + j]
            p = tl.exp2(s - tops)
            start = 0
            for j in tl.static_range(COUNT):
                mine = segment(t, start, LENGTHS[OFFSET + j])
                share = inverse(tl.sum(tl.where(mine, p, 0.0), 1))
                stats = stats + ((found[j], share),)
                if weights is not None:
                    w = stream_weight(weights, row, stream + j, pixel, inside, ACC)
                    share = tl.where(w == 0, 0.0, w * share)
                shares = tl.where(mine, share[:, None], shares)
                start += LENGTHS[OFFSET + j]
        return (_weigh(shares, p),), stats


@triton.jit
def _add_short(out, stats, q, tiles, weights, row, scale, pixel_regions, pixel, inside, stream,
               LENGTHS: tl.constexpr, OFFSET: tl.constexpr, COUNT: tl.constexpr, BIASED: tl.constexpr,
               REGIONS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    p, more = _soften(q, tiles, weights, row, scale, pixel_regions, pixel, inside, stream, LENGTHS, OFFSET, COUNT,
    BIASED, REGIONS,
                      ACC)  # fmt: skip
    out = spread(p[0], tiles[0][1], out)
    if len(tiles) == 2:
        out = spread(p[1], tiles[1][1], out)
    return out, stats + more


@triton.jit
def _add_long(out, q, key, value, bias, weights, row, head, scale, pixel, inside, START: tl.constexpr,
              STREAM: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
              UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out with a long image stream, and that stream's (largest score, 1 / sum)."""
    found, own = _attend(q, key, value, bias, None, pixel, row, head, scale, START, END,
                         weights is not None, BLOCK, D, PARTS, UNIT, ACC)  # fmt: skip
    if weights is not None:
        own = weighed(own, stream_weight(weights, row, STREAM, pixel, inside, ACC))
    return plus(out, own), found


@triton.jit
def _add_group(out, stats, q, key, value, bias, weights, row, head, scale, pixel, inside, kept, RESIDENT: tl.constexpr,
               START: tl.constexpr, STREAM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, LENGTHS: tl.constexpr,
               OFFSET: tl.constexpr, COUNT: tl.constexpr,
               END: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
               ACC: tl.constexpr):  # fmt: skip
    """out and stats with one group of short image streams."""
    TAINT: tl.constexpr = weights is not None
    if RESIDENT:
        tiles = kept
    else:
        tiles = group_tiles(key, value, bias, None, row, head, START, END, A, B, TAINT, D, PARTS, UNIT, ACC)
    return _add_short(out, stats, q, tiles, weights, row, scale, pixel, pixel, inside, STREAM, LENGTHS, OFFSET, COUNT,
                      TAINT or bias is not None, False, ACC)  # fmt: skip


@triton.jit
def _add_equal(out, q, key, value, bias, weights, row, head, scale, pixel, inside, count, LENGTHS: tl.constexpr,
OFFSET: tl.constexpr, COUNT: tl.constexpr,
               D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out with `count` groups of short image streams that are all alike, one tile of keys each."""
    for g in range(0, count):
        keys = LENGTHS[OFFSET] * COUNT
        tile = key_tile(key, value, bias, None, row, head, g * keys, (g + 1) * keys, 16, weights is not None, D, PARTS,
                        UNIT, ACC)  # fmt: skip
        p, _ = _soften(q, (tile,), weights, row, scale, pixel, pixel, inside, g * COUNT, LENGTHS, OFFSET, COUNT,
                       True, False,
                       ACC)  # fmt: skip
        out = spread(p[0], tile[1], out)
    return out


@triton.jit
def _stats_of(asked, text_stats, stats, BM: tl.constexpr, STREAMS: tl.constexpr):
    """(largest score, 1 / sum) of the streams that a chunk of read-out tokens lies in [BM, 16]."""
    of_text, index = asked[3], asked[4]
    top = tl.where(of_text[None], text_stats[0][:, None], 0.0)
    share = tl.where(of_text[None], text_stats[1][:, None], 0.0)
    for j in tl.static_range(len(STREAMS)):
        mine = segment(index, STREAMS[j][0], STREAMS[j][1])
        top = tl.where(mine, stats[j][0][:, None], top)
        share = tl.where(mine, stats[j][1][:, None], share)
    return top, share


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
    read,
    heads,
    groups,
    per_group,
    equal_groups,
    scale_high,  # with scale_low the scale of scores in powers of two
    scale_low,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    TEXT: tl.constexpr,  # "short", "long" or "none"
    A: tl.constexpr,
    B: tl.constexpr,
    IMAGES: tl.constexpr,  # triton_plan.flat
    LENGTHS: tl.constexpr,  # of the image streams, in the order of the groups
    EQUAL: tl.constexpr,  # streams of a group, where all groups are alike
    STREAMS: tl.constexpr,  # the first key and the length of each image stream, in the order of the groups
    IMAGE_KEYS: tl.constexpr,
    TEXT_RESIDENT: tl.constexpr,
    IMAGES_RESIDENT: tl.constexpr,
    ONE_READ: tl.constexpr,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = P V + sum_i w_i P_i V_i, and columns of P or their sums."""
    row, head, group = place(groups, heads)
    REGIONS: tl.constexpr = query_regions is not None
    scale = scale_of(scale_high, scale_low, EXACT, ACC)
    text, images, asked = (), (), ()
    if ONE_READ:
        asked = asked_tokens(read_tokens(tokens, row, 0, read), key, image_key, key_bias, image_key_bias, key_regions,
                             row, head, keys, IMAGE_KEYS, D, PARTS, UNIT, ACC)  # fmt: skip
    if TEXT_RESIDENT:
        text = group_tiles(key, value, key_bias, key_regions, row, head, 0, keys, A, B, REGIONS, D, PARTS, UNIT,
                           ACC)  # fmt: skip
    if IMAGES_RESIDENT:
        images = resident_images(image_key, image_value, image_key_bias, row, head, IMAGES, image_weights is not None,
                                 D, PARTS, UNIT, ACC)  # fmt: skip
    tiles = tl.cdiv(pixels, BM)
    for tile in range(group * per_group, tl.minimum(tiles, (group + 1) * per_group)):
        pixel = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        inside = pixel < pixels
        q = load_rows(query, row, head, pixel, inside, D, PARTS, UNIT)
        pixel_regions = tl.zeros([BM], tl.int32)
        if REGIONS:
            pixel_regions = vector(query_regions, row, pixel, inside, 0)
        acc = zeros(BM, PARTS, ACC)
        stats = ()
        # Long streams first: a running softmax needs an accumulator of its own, the others add to what is there.
        if TEXT == "long":
            text_stats, acc = _attend(q, key, value, key_bias, key_regions, pixel_regions, row, head, scale, 0, keys,
                                      REGIONS, BLOCK, D, PARTS, UNIT, ACC)  # fmt: skip
        else:
            text_stats = (tl.zeros([BM], ACC), tl.zeros([BM], ACC))
        for g in tl.static_range(len(IMAGES)):
            if IMAGES[g][0]:
                acc, found = _add_long(acc, q, image_key, image_value, image_key_bias, image_weights, row, head, scale,
                                       pixel, inside, IMAGES[g][1], IMAGES[g][2], IMAGES[g][6], BLOCK, D, PARTS, UNIT,
                                       ACC)  # fmt: skip
                stats = stats + (found,)
        if TEXT == "short":
            shown = text
            if not TEXT_RESIDENT:
                shown = group_tiles(key, value, key_bias, key_regions, row, head, 0, keys, A, B, REGIONS, D, PARTS,
                                    UNIT, ACC)  # fmt: skip
            acc, found = _add_short(acc, (), q, shown, None, row, scale, pixel_regions, pixel, inside, 0, LENGTHS, 0, 1,
                                    REGIONS or key_bias is not None, REGIONS, ACC)  # fmt: skip
            text_stats = found[0]
        if EQUAL > 0:
            acc = _add_equal(acc, q, image_key, image_value, image_key_bias, image_weights, row, head, scale, pixel,
                             inside, equal_groups, LENGTHS, 0, EQUAL, D, PARTS, UNIT, ACC)  # fmt: skip
        else:
            for g in tl.static_range(len(IMAGES)):
                if not IMAGES[g][0]:
                    acc, stats = _add_group(
                        acc, stats, q, image_key, image_value, image_key_bias, image_weights, row, head, scale, pixel,
                        inside, images[g] if IMAGES_RESIDENT else images, IMAGES_RESIDENT, IMAGES[g][1], IMAGES[g][2],
                        IMAGES[g][3], IMAGES[g][4], LENGTHS, IMAGES[g][5], IMAGES[g][7], IMAGES[g][6], D, PARTS,
                        UNIT, ACC,
                    )  # fmt: skip
        store_rows(out, row, pixels, head, heads, pixel, inside, acc, D, PARTS)
        if readout is not None:
            for first in range(0, READ if ONE_READ else read, READ):
                if ONE_READ:
                    chunk = asked
                else:
                    chunk = asked_tokens(read_tokens(tokens, row, first, read), key, image_key, key_bias,
                                         image_key_bias,
                                         key_regions, row, head, keys, IMAGE_KEYS, D, PARTS, UNIT, ACC)  # fmt: skip
                top, share = _stats_of(chunk, text_stats, stats, BM, STREAMS)
                p = column_values(q, chunk, top, share, pixel_regions, scale, REGIONS, ACC)
                m = first + tl.arange(0, READ)
                if token_weights is None:
                    at = ((row * heads + head) * pixels + pixel[:, None]) * read + m[None]
                    tl.store(readout + at, p, mask=inside[:, None] & (m < read)[None])
                else:
                    r = load_columns(token_weights, row, head, pixel, inside, first, read, ACC)
                    summed = tl.sum(tl.where(inside[:, None], r * p, 0.0), 0)
                    at = ((row * heads + head) * tiles + tile) * read + m
                    tl.store(readout + at, summed, mask=m < read)
