"""Localized attention in Triton: how keys and pixels are cut into tiles, and the launches."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..launching import accumulator, ceil_div, launch, processors
from ..precision import accumulate_dtype
from .triton_forward import localized_attention_fwd_kernel
from .triton_tiles import Columns, Heads, Vectors, Weights

BLOCK = 64  # keys taken at once from a long stream


class Group(NamedTuple):
    """Image streams handled together: short ones share a tile, a long one has its own."""

    start: int  # the first key, counted over all image streams
    stream: int  # the first stream
    full: int  # blocks of BLOCK keys before the last tiles
    first: int  # keys of the last tiles: one, or two
    second: int
    lengths: tuple[int, ...]


def cut(length: int) -> tuple[int, int, int]:
    """How many full blocks a stream of keys has, and the sizes of its last one or two tiles."""
    rounded = 16 * ceil_div(length, 16)
    full, rest = divmod(rounded, BLOCK)
    if full and rest in (0, 16):
        return full - 1, BLOCK, rest
    return (full, 32, 16) if rest == 48 else (full, rest, 0)


@functools.lru_cache(maxsize=256)
def pack(lengths: tuple[int, ...]) -> tuple[Group, ...]:
    """Image streams as groups: short ones fill tiles of 16 keys in their order."""
    groups: list[Group] = []
    start = 0
    for stream, length in enumerate(lengths):
        last = groups[-1] if groups else None
        if last is not None and last.first == 16 and not last.full and sum(last.lengths) + length <= 16:
            groups[-1] = last._replace(lengths=(*last.lengths, length))
        else:
            groups.append(Group(start, stream, *cut(max(length, 1)), (length,)))
        start += length
    return tuple(groups)


@functools.lru_cache(maxsize=256)
def parts(head_dim: int) -> tuple[int, ...]:
    """The head dimension as one or two powers of two, at least 16, with the least padding."""
    powers = (16, 32, 64, 128, 256)
    choices = [(a,) for a in powers] + [(a, b) for a in powers for b in powers if b <= a < 256]
    return min((c for c in choices if sum(c) >= head_dim), key=lambda c: (sum(c), len(c)))


class Tile(NamedTuple):
    """How one program runs."""

    pixels: int
    warps: int
    stages: int


# By the element's bytes and the padded head dimension: the first whose limit holds.
TILES = {
    2: ((128, Tile(64, 4, 2)), (256, Tile(64, 8, 1))),
    4: ((64, Tile(32, 4, 1)), (256, Tile(16, 4, 1))),
    8: ((256, Tile(16, 4, 1)),),
}
RESIDENT_BYTES = 48 << 10  # of keys and values that a program keeps
PROGRAMS = 4  # per multiprocessor, before a program takes another tile of pixels
MOST_TILES = 16


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
    """A float64 as two float32, which is what a kernel's float arguments are."""
    high = torch.tensor(scale, dtype=torch.float32).item()
    return high, scale - high


class _Plan(NamedTuple):
    """What the kernels are specialised for."""

    parts: tuple[int, ...]
    text: tuple[int, int, int]
    groups: tuple[Group, ...]
    resident: bool
    tile: Tile


@functools.lru_cache(maxsize=256)
def plan(size: int, head_dim: int, keys: int, lengths: tuple[int, ...]) -> _Plan:
    """The cut of one call's shapes; `size` is an element's bytes."""
    wide = parts(head_dim)
    text = cut(keys) if keys else (0, 0, 0)
    groups = pack(lengths)
    kept = text[1] + text[2] + sum(g.first + g.second for g in groups)
    tile = next(tile for limit, tile in TILES[size] if sum(wide) <= limit)
    return _Plan(wide, text, groups, 2 * kept * sum(wide) * size <= RESIDENT_BYTES and size == 2, tile)


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
    cuts = plan(query.element_size(), width, keys, lengths)
    unit = _unit(query, key, value, image_key, image_value)
    tiles = ceil_div(pixels, cuts.tile.pixels)
    each = per_program(tiles, rows * heads, query.device)
    groups = ceil_div(tiles, each)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    read = 0 if readout_tokens is None else readout_tokens.shape[1]
    shape = (rows, heads, pixels if readout_weights is None else tiles, read)
    readout = query.new_empty(shape if read else (rows, heads, 0), dtype=accumulate_dtype(query.dtype))
    launch(
        localized_attention_fwd_kernel, (rows * heads * groups,), query.device,
        _heads(query, unit), _heads(key, unit), _heads(value, unit), _vectors(key_bias), _vectors(query_regions),
        _vectors(key_regions), None if image_key is None else _heads(image_key, unit),
        None if image_value is None else _heads(image_value, unit), _vectors(image_key_bias), _weights(image_weights),
        _vectors(readout_tokens) if read else None, _token_weights(readout_weights) if read else None,
        out, readout if read else None, pixels, keys, cuts.text[0], read, heads, groups, each, *_split(scale),
        D=width, PARTS=cuts.parts, UNIT=unit, BM=cuts.tile.pixels, LOOP=cuts.text[0] > 0, A=cuts.text[1],
        B=cuts.text[2], IMAGES=tuple(map(tuple, cuts.groups)), LENGTHS=lengths, IMAGE_KEYS=sum(lengths),
        RESIDENT=cuts.resident, ACC=accumulator(query.dtype), num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
    )  # fmt: skip
    if readout_tokens is not None and readout_weights is not None:
        readout = readout.sum(2) if read else readout
    return out, readout
