"""Updates of low rank in Triton: the launches, and how they are cut."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launching import accumulator, architecture, ceil_div, launch, processors
from ..precision import accumulate_dtype
from . import reference
from .triton_kernels import (
    gate_part_kernel,
    given_update_kernel,
    linear_kernel,
    products_kernel,
    table_part_kernel,
    table_sum_kernel,
    update_kernel,
)  # fmt: skip
from .triton_updates import PerUpdate, Slots, Table, Tokens
from .updates import Updates


class Tile(NamedTuple):
    """One program's share of the GEMM, and how it runs."""

    tokens: int
    outputs: int
    inner: int
    warps: int
    stages: int


# By the element's bytes and whether a row's tokens are a prompt or the pixels of a picture. Of the tiles of pixels two
# or three fit a multiprocessor, so that one's epilogue hides behind another's products.
TILES = {
    (2, "prompt"): Tile(64, 64, 64, 4, 3),
    (2, "pixels"): Tile(128, 64, 64, 4, 3),
    (4, "prompt"): Tile(16, 64, 32, 4, 2),
    (4, "pixels"): Tile(32, 64, 32, 4, 2),
    (8, "prompt"): Tile(16, 32, 16, 4, 1),
    (8, "pixels"): Tile(16, 32, 16, 4, 1),
}
PROMPT_TOKENS = 160  # a row of more tokens is tiled as pixels
UPDATE_TILE = (32, 128)  # tokens, outputs
TABLE_TILE = (32, 64)  # tokens, columns of a table's gradient
SPLIT = 512  # tokens summed by one program of a table's gradient
CHUNK = 16  # updates handled at once where a row has few: the narrowest tile of a matrix unit
FEW = 4  # updates that are added one by one


def _tokens(x: Tensor | None) -> Tokens | None:
    return None if x is None else Tokens(x, *x.stride())


def _table(t: Tensor | None) -> Table | None:
    return None if t is None else Table(t, *t.stride())


def _per(table: Tensor | None) -> PerUpdate | None:
    if table is None:
        return None
    if table.dim() == 2:
        return PerUpdate(table, table.stride(0), table.stride(1), 0)
    return PerUpdate(table, 0, 0, table.stride(0))


class _Rows(NamedTuple):
    """A call's updates as kernels take them."""

    slots: Slots
    gate: tuple[PerUpdate | None, ...]  # beta, tau, strength
    weights: Tokens | None
    given: Tokens | None
    width: int  # R
    options: dict[str, Any]  # how many slots a row has, and how many updates are handled at once


def _rows(updates: Updates, size: int) -> _Rows:
    u = updates
    slots = Slots(
        u.slots, u.slots.stride(0), u.slots.stride(1), u.slots.shape[1],
        None if u.offsets is None else u.offsets.contiguous(), u.choices, u.max_rank, u.width, u.up.shape[0],
    )  # fmt: skip
    chunk, slots_together = CHUNK, 1
    if u.offsets is not None:
        slots_together = 1 << max(u.slots.shape[1] - 1, 0).bit_length()
        # What a row's adapters have between them; where nobody said, by the adapters' mean. Wide types have no room.
        likely = u.slots.shape[1] * min(u.max_rank, ceil_div(u.up.shape[0], max(u.choices, 1)))
        chunk = 2 * CHUNK if likely > CHUNK and size == 2 else CHUNK
    return _Rows(
        slots, tuple(_per(table) for table in (u.beta, u.tau, u.strength)), _tokens(u.token_weights),
        _tokens(u.coefficients), u.width, {"J": slots_together, "C": chunk},
    )  # fmt: skip


def _tile(x: Tensor) -> Tile:
    tile = TILES[x.element_size(), "prompt" if x.shape[1] <= PROMPT_TOKENS else "pixels"]
    # AMD's multiprocessors have 64 KiB of shared memory.
    return tile._replace(stages=min(tile.stages, 2)) if architecture(x.device).startswith("gfx") else tile


def _gemm(
    x: Tensor,  # [B, T, K]
    weight: Table,  # [O, K]
    outputs: int,
    bias: Tensor | None,  # [O]
    scale: Tensor | None,  # [B, O]
    u: Tensor | None,  # [P, O]
    v: Tensor | None,  # [P, K]
    rows: _Rows,
    similarity: Tensor | None = None,  # [B, T, R]
    dc: Tensor | None = None,  # [B, T, R]
) -> Tensor:  # [B, T, O]
    batch, tokens, width = x.shape
    y = x.new_empty(batch, tokens, outputs)
    tile = _tile(x)
    if rows.slots.offsets is not None and tile.tokens == 128:  # whose lists and weights take registers
        tile = tile._replace(warps=8)
    if similarity is not None:  # the gate's slope takes registers
        tile = tile._replace(outputs=tile.outputs // 2)
    grid = (ceil_div(tokens, tile.tokens), ceil_div(outputs, tile.outputs), batch)
    launch(
        linear_kernel, grid, x.device,
        _tokens(x), weight, bias, _table(scale), _table(u), _table(v), rows.slots, rows.given, *rows.gate,
        rows.weights, similarity, dc, y, tokens, width, outputs,
        ACC=accumulator(x.dtype), BT=tile.tokens, BO=tile.outputs, BK=tile.inner, **rows.options,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _products_of(x: Tensor, v: Tensor, rows: _Rows) -> Tensor:  # [B, T, C], [P, C] -> [B, T, R]
    batch, tokens, width = x.shape
    s = x.new_empty(batch, tokens, rows.width, dtype=accumulate_dtype(x.dtype))
    tile = _tile(x)
    launch(
        products_kernel, (ceil_div(tokens, tile.tokens), ceil_div(rows.width, rows.options["C"]), batch), x.device,
        _tokens(x), _table(v), rows.slots, s, tokens, width,
        BT=tile.tokens, BK=tile.inner, **rows.options, num_warps=4, num_stages=tile.stages,
    )  # fmt: skip
    return s


def linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    updates: Updates,
) -> Tensor:  # [B, N, O]
    bias = None if bias is None else bias.contiguous()
    rows = _rows(updates, x.element_size())
    v = updates.down if updates.coefficients is None else None
    return _gemm(x, _weight(weight), weight.shape[0], bias, output_scale, updates.up, v, rows)


def _weight(weight: Tensor) -> Table:
    return Table(weight, weight.stride(0), weight.stride(1))


def update(base: Tensor, x: Tensor | None, updates: Updates) -> Tensor:  # [B, N, O], [B, N, K] -> [B, N, O]
    batch, tokens, outputs = base.shape
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    rows, (block_t, block_o) = _rows(updates, base.element_size()), UPDATE_TILE
    if updates.coefficients is not None:
        launch(
            given_update_kernel, (ceil_div(tokens, block_t), ceil_div(outputs, block_o), batch), base.device,
            _tokens(base), _table(updates.up), rows.slots, rows.given, y, tokens, outputs,
            ACC=accumulator(base.dtype), BT=block_t, BO=block_o, C=CHUNK, FEW=rows.width if rows.width <= FEW else 0,
            num_warps=4,
        )  # fmt: skip
        return y
    assert x is not None  # what the schema cannot say
    # A program's products serve all of its outputs: as many as leave two programs for each multiprocessor.
    programs = ceil_div(tokens, block_t) * batch
    splits = min(ceil_div(outputs, block_o), max(1, ceil_div(2 * processors(base.device), max(programs, 1))))
    share = ceil_div(ceil_div(outputs, block_o), max(splits, 1)) * block_o
    launch(
        update_kernel, (ceil_div(tokens, block_t), ceil_div(outputs, share) if share else 0, batch), base.device,
        _tokens(base), _tokens(x), _table(updates.up), _table(updates.down), rows.slots, rows.gate[2], rows.weights, y,
        tokens, x.shape[2], outputs, share,
        ACC=accumulator(base.dtype), BT=block_t, BO=block_o, BK=_tile(x).inner, **rows.options, num_warps=8,
        num_stages=_tile(x).stages,
    )  # fmt: skip
    return y


def _sum_over_rows(part: Tensor, rows: _Rows, like: Tensor) -> Tensor:  # [B, splits, R, C] -> like's shape
    batch, splits, _, width = part.shape
    grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    columns = TABLE_TILE[1]
    launch(  # tables may have more rows than a grid's second dimension has room for
        table_sum_kernel, (rows.slots.total, ceil_div(width, columns)), part.device,
        part, rows.slots, grad, batch, splits, width, BC=columns, **rows.options, num_warps=2,
    )  # fmt: skip
    return grad


def _table_gradient(
    x: Tensor,  # [B, T, C]
    table: Tensor,  # [P, C]
    rows: _Rows,
    similarity: Tensor | None,  # [B, T, R]
    dc: Tensor | None,  # [B, T, R]
) -> Tensor:  # [P, C]
    batch, tokens, width = x.shape
    splits = ceil_div(tokens, SPLIT)
    part = x.new_empty(batch, splits, rows.width, width, dtype=accumulate_dtype(x.dtype))
    block_t, block_c = TABLE_TILE
    launch(
        table_part_kernel,
        (ceil_div(width, block_c), splits * ceil_div(rows.width, rows.options["C"]), batch), x.device,
        _tokens(x), rows.slots, rows.given, similarity, dc, *rows.gate, rows.weights, part, tokens, width,
        SPLIT=SPLIT, BT=block_t, BC=block_c, **rows.options, num_warps=4,
    )  # fmt: skip
    return _sum_over_rows(part, rows, table)


def linear_backward(
    grad: Tensor,  # [B, N, O]
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    updates: Updates,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """The gradients that are needed, of x and of the updates' tensors."""
    rows, is_given = _rows(updates, grad.element_size()), updates.coefficients is not None
    through = not is_given and any(needs[name] for name in ("x", "down", *_FACTORS))
    similarity = _similarity(x, updates, rows, through or needs["up"])
    if not needs["x"] or x.shape[2] == 0:  # without columns no launch, and none that leaves dc behind
        dc = _products_of(grad, updates.up, rows) if through or needs["coefficients"] else None
        return _gradients(grad, x, updates, rows, similarity, dc, needs)
    dc = None
    if through or needs["coefficients"]:
        # Of adapters a row may take fewer updates than there is room for, and then leaves the rest as it is.
        new = grad.new_empty if updates.offsets is None else grad.new_zeros
        dc = new(*grad.shape[:2], rows.width, dtype=accumulate_dtype(grad.dtype))
    transposed = Table(weight, weight.stride(1), weight.stride(0))
    down, up = None if is_given else updates.down, None if dc is None else updates.up
    dx = _gemm(grad, transposed, x.shape[2], None, None, down, up, rows._replace(given=None), similarity, dc)
    return {"x": dx, **_gradients(grad, x, updates, rows, similarity, dc, needs)}


def update_backward(grad: Tensor, x: Tensor | None, updates: Updates, needs: dict[str, bool]) -> dict[str, Tensor]:
    """The gradients that are needed of x [B, N, K] and of the updates' tensors; grad is [B, N, O]."""
    rows, is_given = _rows(updates, grad.element_size()), updates.coefficients is not None
    through = any(needs[name] for name in ("x", "down", "coefficients", *_FACTORS))
    similarity = None if x is None else _similarity(x, updates, rows, not is_given and (through or needs["up"]))
    dc = _products_of(grad, updates.up, rows) if through else None
    found = _gradients(grad, x, updates, rows, similarity, dc, needs)
    if needs["x"] and x is not None and dc is not None:
        assert updates.down is not None  # what the schema cannot say
        taken, owner = reference.table_rows(updates)
        ds = reference.scaled(dc, reference.strengths(updates, taken, owner, dc.dtype))
        ds = reference.scaled(ds, reference.weights(updates, taken, owner, dc.dtype))
        given = Updates(updates.down, None, None, taken.int(), None, None, None, None, ds, 1)
        found["x"] = update(torch.zeros_like(x), None, given)
    return found


_FACTORS = ("beta", "tau", "strength", "token_weights")


def _similarity(x: Tensor, updates: Updates, rows: _Rows, is_needed: bool) -> Tensor | None:  # [B, N, R]
    return _products_of(x, updates.down, rows) if is_needed and updates.down is not None else None


def _gradients(
    grad: Tensor,  # [B, N, O]
    x: Tensor | None,  # [B, N, K]
    updates: Updates,
    rows: _Rows,
    similarity: Tensor | None,  # [B, N, R]
    dc: Tensor | None,  # [B, N, R]
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """Those of the updates' tensors."""
    found: dict[str, Tensor] = {}
    if needs["coefficients"] and dc is not None:
        found["coefficients"] = dc
    if needs["up"]:
        found["up"] = _table_gradient(grad, updates.up, rows, similarity, None)
    if needs["down"] and x is not None and updates.down is not None:
        found["down"] = _table_gradient(x, updates.down, rows, similarity, dc)
    if similarity is not None and dc is not None and any(needs[name] for name in _FACTORS):
        if updates.offsets is None:
            found |= _gate_gradients(rows, similarity, dc, updates, needs)
        else:
            found |= reference.factor_gradients(dc * similarity, updates, *reference.table_rows(updates))
    return found


def _gate_gradients(
    rows: _Rows,
    similarity: Tensor,  # [B, T, R]
    dc: Tensor,  # [B, T, R]
    updates: Updates,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    batch, tokens, width = dc.shape
    gate = {"beta": updates.beta, "tau": updates.tau, "strength": updates.strength}
    sums = {name: dc.new_empty(batch, width) for name, table in gate.items() if table is not None}
    launch(
        gate_part_kernel, (ceil_div(width, CHUNK), batch), dc.device,
        rows.slots, similarity, dc, *rows.gate, *(sums.get(name) for name in gate), tokens,
        BT=64, C=CHUNK, num_warps=4,
    )  # fmt: skip
    found = {}
    for name, table in gate.items():
        if needs[name] and table is not None:
            if table.dim() == 2:
                found[name] = sums[name].to(table.dtype)
            else:
                found[name] = _sum_over_rows(sums[name].view(batch, 1, width, 1), rows, table)
    return found
