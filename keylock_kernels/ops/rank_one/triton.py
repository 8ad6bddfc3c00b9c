"""The gated rank-one update in Triton: the launches, and how they are cut."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..launching import accumulator, architecture, ceil_div, launch
from ..precision import accumulate_dtype
from .triton_kernels import (
    CHUNK,
    PerUpdate,
    Slots,
    Table,
    Tokens,
    gate_part_kernel,
    linear_kernel,
    products_kernel,
    table_part_kernel,
    table_sum_kernel,
    update_kernel,
)  # fmt: skip


class Tile(NamedTuple):
    """One program's share of the GEMM, and how it runs."""

    tokens: int
    tail: int  # more tokens, in a second accumulator
    outputs: int
    inner: int
    warps: int
    stages: int


# By the element's bytes and whether a row's tokens are a prompt or the pixels of a picture.
TILES = {
    (2, "prompt"): Tile(64, 16, 64, 64, 4, 3),
    (2, "pixels"): Tile(128, 0, 128, 64, 8, 3),
    (4, "prompt"): Tile(16, 0, 64, 32, 4, 2),
    (4, "pixels"): Tile(32, 0, 64, 32, 4, 2),
    (8, "prompt"): Tile(16, 0, 32, 16, 4, 1),
    (8, "pixels"): Tile(16, 0, 32, 16, 4, 1),
}
PROMPT_TOKENS = 160  # a row of more tokens is tiled as pixels
UPDATE_TILE = (32, 128)  # tokens, outputs
TABLE_TILE = (32, 64)  # tokens, columns of a table's gradient
SPLIT = 512  # tokens summed by one program of a table's gradient


def _tokens(x: Tensor | None) -> Tokens | None:
    return None if x is None else Tokens(x, *x.stride())


def _table(t: Tensor | None) -> Table | None:
    return None if t is None else Table(t, *t.stride())


def _slots(slots: Tensor, count: int) -> Slots:
    return Slots(slots, slots.stride(0), slots.stride(1), slots.shape[1], count)


def _per(table: Tensor | None) -> PerUpdate | None:
    if table is None:
        return None
    if table.dim() == 2:
        return PerUpdate(table, table.stride(0), table.stride(1), 0)
    return PerUpdate(table, 0, 0, table.stride(0))


def _tile(x: Tensor) -> Tile:
    tile = TILES[x.element_size(), "prompt" if x.shape[1] <= PROMPT_TOKENS else "pixels"]
    # AMD's multiprocessors have 64 KiB of shared memory.
    return tile._replace(stages=min(tile.stages, 2)) if architecture(x.device).startswith("gfx") else tile


def _gemm(
    x: Tensor,  # [B, T, K]
    weight: Table,  # [O, K]
    outputs: int,
    bias: Tensor | None,  # [O]
    u: Tensor | None,  # [S, O]
    v: Tensor | None,  # [S, K]
    slots: Slots,
    given: Tensor | None,  # [B, T, R]
    gate: tuple[Tensor | None, ...],  # beta, tau, strength
    similarity: Tensor | None = None,  # [B, T, R]
    dc: Tensor | None = None,  # [B, T, R]
) -> Tensor:  # [B, T, O]
    rows, tokens, width = x.shape
    y = x.new_empty(rows, tokens, outputs)
    tile = _tile(x)
    if similarity is not None:  # the gate's slope takes registers
        tile = tile._replace(outputs=tile.outputs // 2)
    grid = (ceil_div(tokens, tile.tokens + tile.tail), ceil_div(outputs, tile.outputs), rows)
    launch(
        linear_kernel, grid, x.device,
        _tokens(x), weight, bias, _table(u), _table(v), slots, _tokens(given), *(_per(g) for g in gate),
        similarity, dc, y, tokens, width, outputs,
        ACC=accumulator(x.dtype), BT=tile.tokens, TAIL=tile.tail, BO=tile.outputs, BK=tile.inner,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _products_of(x: Tensor, v: Tensor, slots: Slots) -> Tensor:  # [B, T, C], [S, C] -> [B, T, R]
    rows, tokens, width = x.shape
    s = x.new_empty(rows, tokens, slots.updates, dtype=accumulate_dtype(x.dtype))
    tile = _tile(x)
    launch(
        products_kernel, (ceil_div(tokens, tile.tokens), ceil_div(slots.updates, CHUNK.value), rows), x.device,
        _tokens(x), _table(v), slots, s, tokens, width,
        BT=tile.tokens, BK=tile.inner, num_warps=4, num_stages=tile.stages,
    )  # fmt: skip
    return s


def linear(
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    u: Tensor,  # [S, O]
    v: Tensor | None,  # [S, K]
    slots: Tensor,  # [B, R]
    bias: Tensor | None,  # [O]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
    coefficients: Tensor | None,  # [B, T, R]
) -> Tensor:  # [B, T, O]
    bias = None if bias is None else bias.contiguous()
    gate = (beta, tau, strength)
    matrix = Table(weight, weight.stride(0), weight.stride(1))
    return _gemm(x, matrix, weight.shape[0], bias, u, v, _slots(slots, u.shape[0]), coefficients, gate)


def update(
    base: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
) -> Tensor:  # [B, T, O]
    rows, tokens, outputs = base.shape
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    block_t, block_o = UPDATE_TILE
    launch(
        update_kernel, (ceil_div(tokens, block_t), ceil_div(outputs, block_o), rows), base.device,
        _tokens(base), _table(u), _slots(slots, u.shape[0]), _tokens(coefficients), y, tokens, outputs,
        ACC=accumulator(base.dtype), BT=block_t, BO=block_o, num_warps=4,
    )  # fmt: skip
    return y


def _sum_over_rows(part: Tensor, slots: Slots, like: Tensor) -> Tensor:  # [B, splits, R, C] -> like's shape
    rows, splits, _, width = part.shape
    grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    columns = TABLE_TILE[1]
    launch(
        table_sum_kernel, (ceil_div(width, columns), slots.total), part.device,
        part, slots, grad, rows, splits, width, BC=columns, num_warps=4,
    )  # fmt: skip
    return grad


def _table_gradient(
    x: Tensor,  # [B, T, C]
    table: Tensor,  # [S, C]
    slots: Slots,
    given: Tensor | None,  # [B, T, R]
    gate: tuple[Tensor | None, ...],
    similarity: Tensor | None,  # [B, T, R]
    dc: Tensor | None,  # [B, T, R]
) -> Tensor:  # [S, C]
    rows, tokens, width = x.shape
    splits = ceil_div(tokens, SPLIT)
    part = x.new_empty(rows, splits, slots.updates, width, dtype=accumulate_dtype(x.dtype))
    block_t, block_c = TABLE_TILE
    launch(
        table_part_kernel,
        (ceil_div(width, block_c), splits * ceil_div(slots.updates, CHUNK.value), rows), x.device,
        _tokens(x), slots, _tokens(given), similarity, dc, *(_per(g) for g in gate), part, tokens, width,
        SPLIT=SPLIT, BT=block_t, BC=block_c, num_warps=4,
    )  # fmt: skip
    return _sum_over_rows(part, slots, table)


def linear_backward(
    grad: Tensor,  # [B, T, O]
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    u: Tensor,  # [S, O]
    v: Tensor | None,  # [S, K]
    slots: Tensor,  # [B, R]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
    coefficients: Tensor | None,  # [B, T, R]
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """The gradients that are needed, of all but weight and bias, in their inputs' dtypes."""
    places, gate = _slots(slots, u.shape[0]), (beta, tau, strength)
    of_gate = needs["beta"] or needs["tau"] or needs["strength"]
    through = coefficients is None and (needs["x"] or needs["v"] or of_gate)
    similarity = None
    if v is not None and (through or needs["u"]):
        similarity = _products_of(x, v, places)
    dc = None
    found: dict[str, Tensor] = {}
    if needs["x"] and x.shape[2] > 0:  # no columns of dx: no launch, and so none that leaves dc behind
        if through or needs["coefficients"]:
            dc = x.new_empty(*x.shape[:2], places.updates, dtype=accumulate_dtype(x.dtype))
        transposed = Table(weight, weight.stride(1), weight.stride(0))
        found["x"] = _gemm(
            grad, transposed, x.shape[2], None, v, None if dc is None else u, places, None, gate,
            similarity, dc,
        )  # fmt: skip
    elif through or needs["coefficients"]:
        dc = _products_of(grad, u, places)
    if needs["coefficients"] and coefficients is not None and dc is not None:
        found["coefficients"] = dc.to(coefficients.dtype)
    if needs["u"]:
        found["u"] = _table_gradient(grad, u, places, coefficients, gate, similarity, None)
    if needs["v"] and v is not None:
        found["v"] = _table_gradient(x, v, places, None, gate, similarity, dc)
    if of_gate:
        found |= _gate_gradients(places, similarity, dc, gate, needs)
    return found


def _gate_gradients(
    slots: Slots,
    similarity: Tensor | None,  # [B, T, R]
    dc: Tensor | None,  # [B, T, R]
    gate: tuple[Tensor | None, ...],
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    assert similarity is not None and dc is not None
    rows, tokens, updates = dc.shape
    names = ("beta", "tau", "strength")
    sums = {name: dc.new_empty(rows, updates) for name, table in zip(names, gate, strict=True) if table is not None}
    launch(
        gate_part_kernel, (ceil_div(updates, CHUNK.value), rows), dc.device,
        slots, similarity, dc, *(_per(g) for g in gate), *(sums.get(name) for name in names), tokens,
        BT=64, num_warps=4,
    )  # fmt: skip
    found = {}
    for name, table in zip(names, gate, strict=True):
        if needs[name] and table is not None:
            if table.dim() == 2:
                found[name] = sums[name].to(table.dtype)
            else:
                found[name] = _sum_over_rows(sums[name].view(rows, 1, updates, 1), slots, table)
    return found


def update_backward(
    grad: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
    need_u: bool,
    need_coefficients: bool,
) -> tuple[Tensor | None, Tensor | None]:
    places = _slots(slots, u.shape[0])
    du = _table_gradient(grad, u, places, coefficients, (None, None, None), None, None) if need_u else None
    dc = _products_of(grad, u, places).to(coefficients.dtype) if need_coefficients else None
    return du, dc
