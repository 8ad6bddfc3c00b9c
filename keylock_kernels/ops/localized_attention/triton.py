"""Localized attention in Triton: the launches."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from ..launching import accumulator, architecture, ceil_div, launch, processors
from ..precision import accumulate_dtype
from .triton_backward import Reads, Slopes, localized_attention_bwd_pixel_kernel
from .triton_forward import localized_attention_fwd_kernel
from .triton_keys import Sum, localized_attention_bwd_key_kernel, localized_attention_bwd_sum_kernel
from .triton_plan import (
    ALL,
    BACKWARD,
    EXTRAS,
    FORWARD,
    IMAGES,
    KEYS,
    PROGRAMS,
    SUM_TILE,
    TEXT,
    alike,
    chunk_of,
    configuration,
    ends,
    flat,
    lengths_of,
    per_program,
    plan,
    streams,
)
from .triton_tiles import READ, Columns, Heads, Vectors, Weights


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


def _columns_of(grad: Tensor, whole: bool) -> tuple[Tensor, int, int, int, int]:
    """The gradient of maps [B, H, N, M] or of sums [B, H, M], which have no stride along pixels."""
    return grad, grad.stride(0), grad.stride(1), grad.stride(2) if whole else 0, grad.stride(-1)


def _split(scale: float) -> tuple[float, float]:
    """The scale of scores in powers of two: a float64 as two float32, which is what a kernel's floats are."""
    scale *= math.log2(math.e)
    (high,) = struct.unpack("f", struct.pack("f", scale))
    return high, scale - high


def _load(images: Tensor | None, *rest: Tensor | None) -> int:
    extras = any(x is not None for x in rest)
    return (ALL if extras else IMAGES) if images is not None else EXTRAS if extras else TEXT


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
    equal = () if cuts.images_resident or read else alike(cuts.groups)
    launch(
        localized_attention_fwd_kernel, (rows * heads * groups,), query.device,
        _heads(query, unit), _heads(key, unit), _heads(value, unit), _vectors(key_bias), _vectors(query_regions),
        _vectors(key_regions), None if image_key is None else _heads(image_key, unit),
        None if image_value is None else _heads(image_value, unit), _vectors(image_key_bias), _weights(image_weights),
        _vectors(readout_tokens) if read else None, _token_weights(readout_weights) if read else None,
        out, readout if read else None, pixels, keys, read, heads, groups, each, len(cuts.groups) if equal else 0,
        *_split(scale),
        D=width, PARTS=cuts.parts, UNIT=unit, BM=cuts.tile.pixels, BLOCK=cuts.tile.block, TEXT=cuts.text, A=cuts.cut[0],
        B=cuts.cut[1], IMAGES=() if equal else flat(cuts.groups), EQUAL=len(equal),
        LENGTHS=equal or lengths_of(cuts.groups),
        STREAMS=() if equal else streams(cuts.groups), IMAGE_KEYS=0 if equal else sum(lengths),
        TEXT_RESIDENT=cuts.text_resident, IMAGES_RESIDENT=cuts.images_resident, ONE_READ=0 < read <= READ.value,
        EXACT=read > 0 or query.element_size() > 2,
        ACC=accumulator(query.dtype), num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
    )  # fmt: skip
    if readout_tokens is not None and readout_weights is not None:
        readout = readout.sum(2) if read else readout
    return out, readout


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
    reads = Reads(  # type: ignore[call-arg]
        *(_columns_of(grad_readout, kind == 1) if kind and grad_readout is not None else (query, 0, 0, 0, 0)),
        *((query, 0, 0, 0) if readout_weights is None else (readout_weights, *readout_weights.stride())),  # type: ignore[arg-type]
        *((query, 0, 0) if readout_tokens is None else (readout_tokens, *readout_tokens.stride())),
        read,
    )
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
    equal = alike(cuts.groups)
    launch(
        localized_attention_bwd_pixel_kernel, (rows * heads * groups,), query.device,
        *shared, dquery, weight_parts, token_parts, slopes, pixels, keys, heads, groups, each,
        len(cuts.groups) if equal else 0, *_split(scale),
        BM=cuts.tile.pixels, BLOCK=cuts.tile.block, TEXT=cuts.text, A=cuts.cut[0], B=cuts.cut[1],
        IMAGES=() if equal else flat(cuts.groups), EQUAL=len(equal),
        LENGTHS=equal or lengths_of(cuts.groups),
        ENDS=ends(lengths), IMAGE_KEYS=total, PER_PIXEL=per_pixel,
        **constants, num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
    )  # fmt: skip
    of_text, of_images = (dkey, dvalue, dbias), (dimage_key, dimage_value, dimage_bias)
    tile = configuration(KEYS, where, query.element_size(), sum(cuts.parts), load)
    a, b = chunk_of(keys, tile.keys)
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
            BM=tile.pixels, A=a, B=b, IMAGE=image if total else 0, ENDS=ends(lengths), **constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if jobs:
        summands, width_of = SUM_TILE
        launch(
            localized_attention_bwd_sum_kernel, (sum(job.p * ceil_div(job.q, width_of) for job in jobs),), query.device,
            tuple(jobs), ACC=accumulator(query.dtype), BR=summands, BQ=width_of, num_warps=4,
        )  # fmt: skip
    return [gradient for gradient in grads if gradient is not None]
