"""Localized attention in Triton: how keys and pixels are cut into tiles, and the launches."""

from __future__ import annotations

import functools
import itertools
import math
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launching import accumulator, architecture, ceil_div, launch, processors
from ..precision import accumulate_dtype
from .triton_backward import (
    Reads,
    Slopes,
    Sum,
    localized_attention_bwd_key_kernel,
    localized_attention_bwd_pixel_kernel,
    localized_attention_bwd_sum_kernel,
)
from .triton_forward import localized_attention_fwd_kernel
from .triton_tiles import READ, Columns, Heads, Vectors, Weights


class Group(NamedTuple):
    """Image streams handled together: short ones share a tile, a long one is alone."""

    long: bool
    start: int  # the first key, counted over all image streams
    stream: int  # the first stream
    first: int  # keys of its tiles: one, or two
    second: int
    lengths: tuple[int, ...]


def cut(length: int) -> tuple[int, int]:
    """The sizes of the one or two tiles that hold a short stream."""
    rounded = 16 * max(1, ceil_div(length, 16))
    return {48: (32, 16), 80: (64, 16)}.get(rounded, (rounded, 0))


@functools.lru_cache(maxsize=256)
def pack(lengths: tuple[int, ...], short: int) -> tuple[Group, ...]:
    """Image streams as groups: those of at most 16 keys fill tiles of 16 in their order; more than `short` are long."""
    groups: list[Group] = []
    start = 0
    for stream, length in enumerate(lengths):
        last = groups[-1] if groups else None
        if last is not None and last.first == 16 and not last.second and sum(last.lengths) + length <= 16:
            groups[-1] = last._replace(lengths=(*last.lengths, length))
        elif length > short:
            groups.append(Group(True, start, stream, 0, 0, (length,)))
        else:
            groups.append(Group(False, start, stream, *cut(length), (length,)))
        start += length
    return tuple(sorted(groups, key=lambda group: not group.long))


def _streams(groups: tuple[Group, ...]) -> tuple[tuple[int, int], ...]:
    """The first key and the length of each stream, in the order in which the kernels come to them."""
    found = []
    for group in groups:
        start = group.start
        for length in group.lengths:
            found.append((start, length))
            start += length
    return tuple(found)


def _alike(groups: tuple[Group, ...]) -> tuple[int, ...]:
    """The lengths in every group, where all groups are alike and one tile of keys; else none."""
    kinds = {(group.first, group.second, group.lengths) for group in groups}
    lengths = groups[0].lengths if len(groups) > 1 and len(kinds) == 1 and groups[0].first == 16 else ()
    return lengths if len(set(lengths)) == 1 else ()


@functools.lru_cache(maxsize=256)
def parts(head_dim: int) -> tuple[int, ...]:
    """The head dimension as one or two powers of two, at least 16, with the least padding."""
    powers = (16, 32, 64, 128, 256)
    choices = [(a,) for a in powers] + [(a, b) for a in powers for b in powers if b <= a < 256]
    return min((c for c in choices if sum(c) >= head_dim), key=lambda c: (sum(c), len(c)))


class Tile(NamedTuple):
    """How one program of the passes over the pixels runs."""

    pixels: int
    warps: int
    stages: int
    short: int  # a stream of more keys is taken in blocks
    block: int  # keys of a block
    resident: int  # bytes of keys and values that a program keeps for all its pixels


class KeyTile(NamedTuple):
    """How one program of the pass over the keys runs."""

    keys: int  # at most, of a chunk of text
    image_keys: int  # at most, of a chunk of images
    pixels: int
    warps: int
    stages: int


class Rule(NamedTuple):
    """A line of a table of configurations; the first that fits is taken."""

    where: str  # an architecture's name begins so
    size: int  # bytes of an element
    width: int  # the widest padded head dimension
    load: int  # the most that a call may ask for: TEXT, IMAGES, EXTRAS or ALL
    tile: Any


TEXT, IMAGES, ALL = 0, 1, 3  # plain text; images too; regions, biases and read-outs too
EXTRAS = 2  # regions, biases and read-outs without images

FORWARD = (
    Rule("sm_9", 2, 96, IMAGES, Tile(64, 4, 2, 80, 32, 62 << 10)),
    Rule("sm_9", 2, 96, ALL, Tile(64, 4, 1, 80, 32, 62 << 10)),
    Rule("sm_9", 2, 256, ALL, Tile(64, 4, 1, 80, 16, 96 << 10)),
    Rule("sm_1", 2, 96, IMAGES, Tile(64, 4, 2, 80, 32, 62 << 10)),
    Rule("sm_1", 2, 96, EXTRAS, Tile(64, 4, 2, 80, 32, 62 << 10)),
    Rule("sm_1", 2, 256, ALL, Tile(64, 8, 1, 80, 32, 62 << 10)),
    Rule("", 2, 96, IMAGES, Tile(64, 4, 2, 80, 32, 62 << 10)),
    Rule("", 2, 256, ALL, Tile(64, 4, 1, 80, 16, 62 << 10)),
    Rule("", 4, 64, ALL, Tile(32, 4, 1, 16, 16, 0)),
    Rule("", 8, 256, ALL, Tile(16, 4, 1, 16, 16, 0)),
)
BACKWARD = (
    Rule("", 2, 96, TEXT, Tile(64, 4, 1, 80, 32, 0)),
    Rule("sm_1", 2, 48, IMAGES, Tile(64, 4, 2, 16, 32, 0)),
    Rule("sm_1", 2, 48, ALL, Tile(64, 4, 1, 16, 32, 0)),
    Rule("sm_1", 2, 64, IMAGES, Tile(64, 4, 3, 16, 16, 0)),
    Rule("sm_1", 2, 64, ALL, Tile(64, 8, 1, 16, 16, 0)),
    Rule("", 2, 96, ALL, Tile(64, 4, 1, 16, 16, 0)),
    Rule("", 2, 256, TEXT, Tile(64, 4, 1, 16, 16, 0)),
    Rule("", 2, 256, IMAGES, Tile(16, 8, 1, 16, 16, 0)),
    Rule("sm_1", 2, 256, EXTRAS, Tile(64, 8, 1, 16, 16, 0)),
    Rule("", 2, 256, ALL, Tile(16, 8, 2, 16, 16, 0)),
    Rule("", 8, 256, ALL, Tile(16, 4, 1, 16, 16, 0)),
)
KEYS = (
    Rule("", 2, 64, IMAGES, KeyTile(80, 64, 32, 4, 1)),
    Rule("sm_1", 2, 64, ALL, KeyTile(32, 16, 32, 8, 1)),
    Rule("", 2, 64, ALL, KeyTile(32, 16, 32, 4, 1)),
    Rule("", 2, 96, ALL, KeyTile(32, 16, 16, 4, 1)),
    Rule("sm_1", 2, 256, IMAGES, KeyTile(16, 16, 32, 8, 1)),
    Rule("", 2, 256, ALL, KeyTile(16, 16, 32, 4, 1)),
    Rule("", 8, 256, ALL, KeyTile(16, 16, 16, 4, 1)),
)
PROGRAMS = 4  # per multiprocessor, before a program takes another tile of pixels
MOST_TILES = 16
SUM_TILE = (8, 256)  # summands, columns


def configuration(rules: tuple[Rule, ...], where: str, size: int, width: int, load: int) -> Any:
    def fits(r: Rule) -> bool:
        return where.startswith(r.where) and size <= r.size and width <= r.width and load <= r.load

    return next(rule.tile for rule in rules if fits(rule))


def _heads(x: Tensor, unit: int) -> Heads:
    # A dimension of one element may have any stride; it is not used.
    b, n, h, d = (stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True))
    return Heads(x, b // unit, n // unit, h // unit, d if x.shape[3] > 1 else 1)


def _unit(*tensors: Tensor | None) -> int:
    """How many elements every stride is a multiple of: 16 bytes, or one."""
    whole = 16
    for x in tensors:
        if x is not None:
            step = whole // x.element_size()
            strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
            if x.shape[3] % step or any(stride % step for stride in strides):
                return 1
    return whole // tensors[0].element_size() if tensors[0] is not None else 1


def _vectors(x: Tensor | None) -> Vectors | None:
    return None if x is None else Vectors(x, *x.stride())


def _weights(x: Tensor | None) -> Weights | None:
    return None if x is None else Weights(x, x.stride(0), x.stride(1), x.stride(2) if x.dim() == 3 else 0)


def _token_weights(x: Tensor | None) -> Columns | None:
    return None if x is None else Columns(x, x.stride(0), 0, x.stride(1), x.stride(2))


def _split(scale: float) -> tuple[float, float]:
    """The scale of scores in powers of two: a float64 as two float32, which is what a kernel's floats are."""
    scale *= math.log2(math.e)
    (high,) = struct.unpack("f", struct.pack("f", scale))
    return high, scale - high


class Plan(NamedTuple):
    """What the kernels are specialised for."""

    parts: tuple[int, ...]
    text: str  # "short", "long" or "none"
    cut: tuple[int, int]
    groups: tuple[Group, ...]
    text_resident: bool
    images_resident: bool
    tile: Tile


@functools.lru_cache(maxsize=512)
def plan(
    rules: tuple[Rule, ...], where: str, size: int, head_dim: int, keys: int, lengths: tuple[int, ...], load: int
) -> Plan:
    """The cut of one call's shapes; `size` is an element's bytes."""
    wide = parts(head_dim)
    tile = configuration(rules, where, size, sum(wide), load)
    text = "none" if keys == 0 else "short" if keys <= tile.short else "long"
    groups = pack(lengths, tile.short)
    bytes_per_key = 2 * sum(wide) * size
    of_text = sum(cut(keys)) * bytes_per_key if text == "short" else 0
    of_images = sum(g.first + g.second for g in groups) * bytes_per_key
    text_resident = text == "short" and of_text <= tile.resident
    images_resident = not any(g.long for g in groups) and of_text + of_images <= tile.resident
    return Plan(wide, text, cut(keys) if text == "short" else (16, 0), groups, text_resident, images_resident, tile)


def padding(size: int, head_dim: int, keys: int, lengths: tuple[int, ...]) -> float:
    """Products that the forward kernel issues over those that the equation needs, pixels filling their tiles."""
    cuts = plan(FORWARD, "sm_90", size, head_dim, keys, lengths, IMAGES if lengths else TEXT)

    def blocks(length: int) -> int:
        return cuts.tile.block * ceil_div(length, cuts.tile.block)

    issued = sum(cuts.cut) if cuts.text == "short" else blocks(keys)
    issued += sum(blocks(g.lengths[0]) if g.long else g.first + g.second for g in cuts.groups)
    return issued * sum(cuts.parts) / ((keys + sum(lengths)) * head_dim)


def _load(images: Tensor | None, *rest: Tensor | None) -> int:
    extras = any(x is not None for x in rest)
    return (ALL if extras else IMAGES) if images is not None else EXTRAS if extras else TEXT


def per_program(tiles: int, others: int, device: torch.device) -> int:
    """Tiles of pixels that one program takes, such that all multiprocessors have work."""
    return max(1, min(MOST_TILES, tiles * others // (PROGRAMS * processors(device))))


def forward(
    query: Tensor,  # [B, N, H, D]
    key: Tensor,  # [B, T, H, D]
    value: Tensor,  # [B, T, H, D]
    scale: float,
    key_bias: Tensor | None,  # [B, T]
    query_regions: Tensor | None,  # [B, N]
    key_regions: Tensor | None,  # [B, T]
    image_key: Tensor | None,  # [B, sum(L), H, D]
    image_value: Tensor | None,  # [B, sum(L), H, D]
    image_lengths: list[int],
    image_key_bias: Tensor | None,  # [B, sum(L)]
    image_weights: Tensor | None,  # [B, I] or [B, I, N]
    readout_tokens: Tensor | None,  # [B, M]
    readout_weights: Tensor | None,  # [B, N, M]
) -> tuple[Tensor, Tensor]:  # [B, N, H, D], and [B, H, N, M] or [B, H, M]
    rows, pixels, heads, width = query.shape
    keys, lengths = key.shape[1], tuple(image_lengths)
    where, load = architecture(query.device), _load(image_key, key_bias, query_regions, image_key_bias, readout_tokens)
    cuts = plan(FORWARD, where, query.element_size(), width, keys, lengths, load)
    unit = _unit(query, key, value, image_key, image_value)
    tiles = ceil_div(pixels, cuts.tile.pixels)
    each = per_program(tiles, rows * heads, query.device)
    groups = ceil_div(tiles, each)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    read = 0 if readout_tokens is None else readout_tokens.shape[1]
    shape = (rows, heads, pixels if readout_weights is None else tiles, read)
    readout = query.new_empty(shape if read else (rows, heads, 0), dtype=accumulate_dtype(query.dtype))
    equal = () if cuts.images_resident or read else _alike(cuts.groups)
    launch(
        localized_attention_fwd_kernel, (rows * heads * groups,), query.device,
        _heads(query, unit), _heads(key, unit), _heads(value, unit), _vectors(key_bias), _vectors(query_regions),
        _vectors(key_regions), None if image_key is None else _heads(image_key, unit),
        None if image_value is None else _heads(image_value, unit), _vectors(image_key_bias), _weights(image_weights),
        _vectors(readout_tokens) if read else None, _token_weights(readout_weights) if read else None,
        out, readout if read else None, pixels, keys, read, heads, groups, each, len(cuts.groups) if equal else 0,
        *_split(scale),
        D=width, PARTS=cuts.parts, UNIT=unit, BM=cuts.tile.pixels, BLOCK=cuts.tile.block, TEXT=cuts.text, A=cuts.cut[0],
        B=cuts.cut[1], IMAGES=() if equal else tuple(map(tuple, cuts.groups)), EQUAL=equal,
        STREAMS=() if equal else _streams(cuts.groups), IMAGE_KEYS=0 if equal else sum(lengths),
        TEXT_RESIDENT=cuts.text_resident, IMAGES_RESIDENT=cuts.images_resident, ONE_READ=0 < read <= READ.value,
        EXACT=read > 0 or query.element_size() > 2,
        ACC=accumulator(query.dtype), num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
    )  # fmt: skip
    if readout_tokens is not None and readout_weights is not None:
        readout = readout.sum(2) if read else readout
    return out, readout


def _chunk(keys: int, most: int) -> tuple[int, int]:
    """The one or two tiles of a chunk of keys that cover a stream at the least cost."""
    choices = [sizes for sizes in ((80, (64, 16)), (64, (64, 0)), (48, (32, 16)), (32, (32, 0)), (16, (16, 0)))
               if sizes[0] <= most]  # fmt: skip
    # What is padded, and that each further chunk reads the pixels again.
    return min(choices, key=lambda choice: ceil_div(keys, choice[0]) * (choice[0] + 16))[1]


def backward(
    grad_out: Tensor | None,  # [B, N, H, D]
    grad_readout: Tensor | None,  # [B, H, N, M] or [B, H, M]
    query: Tensor,  # [B, N, H, D]
    key: Tensor,  # [B, T, H, D]
    value: Tensor,  # [B, T, H, D]
    scale: float,
    key_bias: Tensor | None,  # [B, T]
    query_regions: Tensor | None,  # [B, N]
    key_regions: Tensor | None,  # [B, T]
    image_key: Tensor | None,  # [B, sum(L), H, D]
    image_value: Tensor | None,  # [B, sum(L), H, D]
    image_lengths: list[int],
    image_key_bias: Tensor | None,  # [B, sum(L)]
    image_weights: Tensor | None,  # [B, I] or [B, I, N]
    readout_tokens: Tensor | None,  # [B, M]
    readout_weights: Tensor | None,  # [B, N, M]
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that are needed, of the floating-point tensors in their order."""
    inputs = (query, key, value, key_bias, image_key, image_value, image_key_bias, image_weights, readout_weights)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    rows, pixels, heads, width = query.shape
    keys, lengths, total = key.shape[1], tuple(image_lengths), sum(image_lengths)
    read = 0 if readout_tokens is None or grad_readout is None else readout_tokens.shape[1]
    if rows * pixels * heads == 0 or (grad_out is None and read == 0):
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in wanted]
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    dquery, dkey, dvalue, dbias, dimage_key, dimage_value, dimage_bias, dweights, dtoken_weights = grads
    wide = accumulate_dtype(query.dtype)
    where, load = architecture(query.device), _load(image_key, key_bias, query_regions, image_key_bias, grad_readout)
    cuts = plan(BACKWARD, where, query.element_size(), width, keys, lengths, load)
    unit = _unit(query, key, value, image_key, image_value, grad_out)
    kind = 0 if read == 0 else 1 if readout_weights is None else 2
    reads = Reads(
        Columns(query, 0, 0, 0, 0) if grad_readout is None or kind == 0
        else Columns(grad_readout, grad_readout.stride(0), grad_readout.stride(1),
                     grad_readout.stride(2) if kind == 1 else 0, grad_readout.stride(-1)),
        Columns(query, 0, 0, 0, 0) if readout_weights is None else _token_weights(readout_weights),
        Vectors(query, 0, 0) if readout_tokens is None else _vectors(readout_tokens),
        read,
    )  # fmt: skip
    blocks = ceil_div(pixels, cuts.tile.pixels)
    each = per_program(blocks, rows * heads, query.device)
    groups = ceil_div(blocks, each)
    top, share, delta = query.new_empty(3, rows, heads, 1 + len(lengths), pixels, dtype=wide)
    slopes = Slopes(top, share, delta, 1 + len(lengths))
    jobs: list[Sum] = []
    per_pixel = image_weights is not None and image_weights.dim() == 3
    weight_parts = token_parts = None
    if dweights is not None:
        last = pixels if per_pixel else blocks
        weight_parts = query.new_empty(rows, len(lengths), heads, last, dtype=wide)
        summed, columns = (heads, last) if per_pixel else (heads * last, 1)
        jobs.append(Sum(weight_parts, dweights, 1, rows * len(lengths), summed, columns))
    if dtoken_weights is not None:
        if kind != 2:
            dtoken_weights.zero_()
        else:
            token_parts = query.new_empty(rows, heads, pixels, read, dtype=wide)
            jobs.append(Sum(token_parts, dtoken_weights, 1, rows, heads, pixels * read))
    shared = (
        _heads(query, unit), _heads(key, unit), _heads(value, unit), _vectors(key_bias), _vectors(query_regions),
        _vectors(key_regions), None if image_key is None else _heads(image_key, unit),
        None if image_value is None else _heads(image_value, unit), _vectors(image_key_bias), _weights(image_weights),
        _heads(query if grad_out is None else grad_out, unit), reads,
    )  # fmt: skip
    constants = {
        "D": width, "PARTS": cuts.parts, "UNIT": unit, "GRAD": grad_out is not None, "KIND": kind,
        "ONE_READ": 0 < read <= READ.value, "ACC": accumulator(query.dtype),
    }  # fmt: skip
    equal = _alike(cuts.groups)
    launch(
        localized_attention_bwd_pixel_kernel, (rows * heads * groups,), query.device,
        *shared, dquery, weight_parts, token_parts, slopes, pixels, keys, heads, groups, each,
        len(cuts.groups) if equal else 0, *_split(scale),
        BM=cuts.tile.pixels, BLOCK=cuts.tile.block, TEXT=cuts.text, A=cuts.cut[0], B=cuts.cut[1],
        IMAGES=() if equal else tuple(map(tuple, cuts.groups)), EQUAL=equal,
        ENDS=_ends(lengths), IMAGE_KEYS=total, PER_PIXEL=per_pixel,
        **constants, num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
    )  # fmt: skip
    of_text, of_images = (dkey, dvalue, dbias), (dimage_key, dimage_value, dimage_bias)
    tile = configuration(KEYS, where, query.element_size(), sum(cuts.parts), load)
    a, b = _chunk(keys, tile.keys)
    image = max(16, min(tile.image_keys, 1 << max(total - 1, 1).bit_length()))
    text_chunks = ceil_div(keys, a + b) if any(t is not None for t in of_text) else 0
    chunks = text_chunks + (ceil_div(total, image) if any(t is not None for t in of_images) else 0)
    if chunks:
        blocks = ceil_div(pixels, tile.pixels)
        shares = max(1, min(blocks, PROGRAMS * processors(query.device) // (rows * heads * chunks)))
        each = ceil_div(blocks, shares)
        shares = ceil_div(blocks, each)
        parts_of: list[Tensor | None] = []
        for gradient in (*of_text, *of_images):
            part = gradient
            if gradient is not None and (shares > 1 or gradient.dim() == 2):
                # A bias is shared by the heads, so even one share of it has something to sum.
                if gradient.dim() == 2:
                    part = query.new_empty(shares, rows, heads, gradient.shape[1], dtype=wide)
                    jobs.append(Sum(part, gradient, shares, rows, heads, gradient.shape[1]))
                else:
                    part = query.new_empty(shares, *gradient.shape, dtype=wide)
                    jobs.append(Sum(part, gradient, shares, 1, 1, gradient.numel()))
            parts_of.append(part)
        launch(
            localized_attention_bwd_key_kernel, (rows * heads * chunks, shares), query.device,
            *shared, slopes, *parts_of, pixels, keys, total, rows, heads, chunks, text_chunks, each, *_split(scale),
            BM=tile.pixels, A=a, B=b, IMAGE=image if total else 0, ENDS=_ends(lengths), **constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if jobs:
        summands, width_of = SUM_TILE
        launch(
            localized_attention_bwd_sum_kernel, (sum(job.p * ceil_div(job.q, width_of) for job in jobs),), query.device,
            tuple(jobs), ACC=accumulator(query.dtype), BR=summands, BQ=width_of, num_warps=4,
        )  # fmt: skip
    return [gradient for gradient in grads if gradient is not None]


def _ends(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The number behind the last key of each image stream but the last."""
    return tuple(itertools.accumulate(lengths[:-1]))
