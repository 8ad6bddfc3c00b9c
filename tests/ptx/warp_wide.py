"""Instructions of whole warps that move data: shuffles, sums over lanes, matrices of 8 by 8 in shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Run, operation
from .faults import Unknown
from .program import Statement
from .values import NUMBERS, Array, Operands

if TYPE_CHECKING:
    from .machine import Squad

_LANE = np.arange(32)


@operation("fence")
def _fence(s: Statement, o: Operands) -> Run:
    s.flags("proxy", "async", "shared::cta")
    return lambda squad: squad.machine.shared.fence(squad)


@operation("bar")
def _warp_barrier(s: Statement, o: Operands) -> Run:
    s.flags("warp", "sync")
    return lambda squad: squad.whole_warps()


def _of_warps(squad: Squad, values: Array) -> Array:  # [warps, 32]
    return np.broadcast_to(values, squad.lanes).reshape(-1, 32)


@operation("shfl")
def _shuffle(s: Statement, o: Operands) -> Run:
    flags = s.flags("sync", "bfly", "idx", "up")
    if s.operands[3:] != ("0" if "up" in flags else "31", "-1") or "|" in s.operands[0]:
        raise Unknown(f"the machine shuffles whole warps only: `{s.text}`")
    target, value, by = o.target(s.operands[0], "b32"), o.source(s.operands[1], "b32"), o.source(s.operands[2], "u32")

    def run(squad: Squad) -> None:
        squad.whole_warps()
        lane = _of_warps(squad, by(squad)) & np.uint32(31)
        lane = _LANE ^ lane if "bfly" in flags else lane.astype(int)
        if "up" in flags:
            lane = np.where(_LANE >= lane, _LANE - lane, _LANE)
        target(squad, np.take_along_axis(_of_warps(squad, value(squad)), lane, 1).reshape(-1))

    return run


@operation("redux")
def _reduce(s: Statement, o: Operands) -> Run:
    flags, kind = s.flags("sync", "add", "max", "min"), s.kinds[-1]
    value, members = o.source(s.operands[1], kind), o.source(s.operands[2], "s32")
    target = o.target(s.operands[0], kind)
    function = {"add": np.sum, "max": np.max, "min": np.min}[next(iter(flags - {"sync"}))]

    def run(squad: Squad) -> None:
        squad.whole_warps()
        if (squad.active(np.broadcast_to(members(squad), squad.lanes)) != -1).any():
            raise Unknown("the machine reduces whole warps only")
        found = function(_of_warps(squad, value(squad)), axis=1).astype(NUMBERS.get(kind, np.uint32))
        target(squad, np.repeat(found, 32))

    return run


def _first_lanes(squad: Squad, matrices: int) -> Array:
    """Those whose addresses count: one for each row of a matrix."""
    return squad.everyone() & np.tile(_LANE < 8 * matrices, squad.lanes // 32)


def _matrices(s: Statement) -> tuple[int, bool]:
    flags = s.flags("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared")
    return next(int(f[1]) for f in flags if f in ("x1", "x2", "x4")), "trans" in flags


@operation("ldmatrix")
def _load_matrices(s: Statement, o: Operands) -> Run:
    count, transposed = _matrices(s)
    targets, address = o.targets(s.operands[0], "b32"), o.address(s.operands[1])

    def run(squad: Squad) -> None:
        squad.whole_warps()
        with squad.only(_first_lanes(squad, count)):
            rows = squad.machine.shared.load(squad, squad.active(address(squad)), 16)
        found = rows.view(np.uint16).reshape(-1, count, 8, 8)
        found = np.ascontiguousarray(found.swapaxes(2, 3) if transposed else found)
        pairs = found.view(np.uint32).reshape(-1, count, 32).swapaxes(1, 2).reshape(-1, count)
        if squad.mask is not None:
            spread = np.zeros((squad.lanes, count), np.uint32)
            spread[squad.mask] = pairs
            pairs = spread
        targets(squad, pairs)

    return run


@operation("stmatrix")
def _store_matrices(s: Statement, o: Operands) -> Run:
    count, transposed = _matrices(s)
    address, sources = o.address(s.operands[0]), o.sources(s.operands[1], "b32")

    def run(squad: Squad) -> None:
        squad.whole_warps()
        pairs = squad.active(sources(squad)).reshape(-1, 32, count).swapaxes(1, 2)
        found = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        found = np.ascontiguousarray(found.swapaxes(2, 3) if transposed else found)
        with squad.only(_first_lanes(squad, count)):
            rows = found.view(np.uint8).reshape(-1, 16)
            squad.machine.shared.store(squad, squad.active(address(squad)), rows)

    return run
