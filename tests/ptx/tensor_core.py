"""Products of matrices in a warp's registers (mma), or with operands in shared memory (wgmma).

Products are summed in float64 and rounded to float32 once an instruction. On a machine that cuts off they are summed as
tensor cores are described: so many terms at a time are aligned to the largest of them and of the sum before, what lies
below is cut off, and the sum is rounded toward zero.

Paper: Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Run, operation
from .faults import Race, Unknown
from .program import Statement
from .values import Array, Operands, Source, decode

if TYPE_CHECKING:
    from .machine import Squad
    from .memory import Shared

_LANE = np.arange(32)
_GROUP, _PLACE = _LANE // 4, _LANE % 4
K = 16
_FRACTION, _GUARD = 23, 2  # bits of a float32's fraction, and those that are kept below them in a sum
_WARPS = 8  # whose terms are aligned at a time


def _pairs(count: int, width: int, places: Array) -> Array:
    """Where in a matrix, row after row, the halves of each lane's registers lie; places: row, column [32, count]."""
    row, column = places
    return np.stack([row * width + column, row * width + column + 1], -1).reshape(-1)


def _left() -> Array:
    register = np.arange(4)
    row = _GROUP[:, None] + 8 * (register % 2)
    column = 2 * _PLACE[:, None] + 8 * (register // 2)
    return _pairs(4, K, (row, column))


def _sums(width: int) -> Array:
    """Where a lane's sums lie in 16 rows of so many columns."""
    register = np.arange(width // 2)
    row = _GROUP[:, None] + 8 * (register // 2 % 2)
    return (row * width + 8 * (register // 4) + 2 * _PLACE[:, None] + register % 2).reshape(-1)


_LEFT = _left()  # 16 x 16
_RIGHT = _pairs(2, K, (_GROUP[:, None], 2 * _PLACE[:, None] + 8 * np.arange(2)))  # 8 x 16, column by column


def _matrix(flat: Array, places: Array, rows: int, columns: int) -> Array:  # [lanes, n] -> [warps, rows, columns]
    matrix = np.empty((len(flat) // 32, rows * columns), flat.dtype)
    matrix[:, places] = flat.reshape(len(matrix), -1)
    return matrix.reshape(-1, rows, columns)


def _halves(registers: Array, kind: str) -> Array:  # uint32 -> float64, twice as many
    return decode(registers.view(np.uint16), kind).astype(np.float64)


def _multiplied(squad: Squad, left: Array, right: Array, sums: Array, places: Array) -> Array:
    """left [w, 16, K] times right [w, n, K], transposed, plus the lanes' sums [lanes, n / 2]."""
    warps, columns, terms = len(left), right.shape[1], squad.machine.terms
    if terms is None:
        product = left @ right.swapaxes(1, 2)
        return (product.reshape(warps, -1)[:, places].reshape(sums.shape) + sums).astype(np.float32)
    before = _matrix(sums, places, 16, columns)
    right = np.broadcast_to(right, (warps, *right.shape[1:]))
    found = np.empty_like(before)
    for first in range(0, warps, _WARPS):
        some = slice(first, first + _WARPS)
        found[some] = cut_off(left[some], right[some], before[some], terms)
    return found.reshape(warps, -1)[:, places].reshape(sums.shape)


def _toward_zero(values: Array, least: Array) -> Array:
    """Multiples of a power of two, the exponent of which is given."""
    unit = np.ldexp(1.0, least)
    return np.trunc(values / unit) * unit


def cut_off(left: Array, right: Array, sums: Array, terms: int) -> Array:
    """float64 left [w, m, K] times right [w, n, K], transposed, plus sums [w, m, n], as a tensor core adds them up."""
    exact = left @ right.swapaxes(1, 2) + sums
    kept = np.nan_to_num(sums.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    a, b = (np.nan_to_num(side, nan=0.0, posinf=0.0, neginf=0.0) for side in (left, right))
    for k in range(0, left.shape[-1], terms):
        products = a[:, :, None, k : k + terms] * b[:, None, :, k : k + terms]
        largest = np.frexp(np.maximum(np.abs(products).max(-1), np.abs(kept)))[1] - 1
        least = largest - _FRACTION - _GUARD
        total = _toward_zero(products, least[..., None]).sum(-1) + _toward_zero(kept, least)
        kept = _toward_zero(total, np.frexp(total)[1] - 1 - _FRACTION)
    return np.where(np.isfinite(exact), kept, exact).astype(np.float32)


# Of the product in float64, 8 x 4 times 4 x 8: a lane has a number of each side, which lie alike, and two sums.
_OF_DOUBLES = (_GROUP * 4 + _PLACE).astype(int)
_SUMS_OF_DOUBLES = (_GROUP[:, None] * 8 + 2 * _PLACE[:, None] + np.arange(2)).reshape(-1)


def _doubles(s: Statement, o: Operands) -> Run:
    a, b, sums = (o.sources(s.operands[i], "f64") for i in (1, 2, 3))
    targets = o.targets(s.operands[0], "f64")

    def run(squad: Squad) -> None:
        squad.whole_warps()
        left, right = (_matrix(side(squad), _OF_DOUBLES, 8, 4) for side in (a, b))
        product = (left @ right.swapaxes(1, 2)).reshape(len(left), -1)
        targets(squad, product[:, _SUMS_OF_DOUBLES].reshape(-1, 2) + sums(squad))

    return run


@operation("mma")
def _mma(s: Statement, o: Operands) -> Run:
    shape = "m8n8k4" if s.kinds == ["f64"] * 4 else "m16n8k16"
    s.flags("sync", "aligned", shape, "row", "col")
    if shape == "m8n8k4":
        return _doubles(s, o)
    kind = s.kinds[1]
    if s.kinds not in (["f32", "bf16", "bf16", "f32"], ["f32", "f16", "f16", "f32"]):
        raise Unknown(f"the machine multiplies 16-bit numbers into float32 only, not `{s.text}`")
    a, b = (o.sources(s.operands[i], "b32") for i in (1, 2))
    sums, targets, places = o.sources(s.operands[3], "f32"), o.targets(s.operands[0], "f32"), _sums(8)

    def run(squad: Squad) -> None:
        squad.whole_warps()
        left = _matrix(_halves(a(squad), kind), _LEFT, 16, K)
        right = _matrix(_halves(b(squad), kind), _RIGHT, 8, K)
        targets(squad, _multiplied(squad, left, right, sums(squad), places))

    return run


# Bytes of a row that is swizzled, and which of its 16-byte pieces change places, by a descriptor's mode.
_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}


def _addresses(descriptor: Array, rows: Array, transposed: bool) -> Array:
    """Where a matrix in shared memory lies: uint64 [w], its rows (along M or N) [w or 1, n] -> [w, n, K]."""
    d = descriptor.astype(np.int64)[:, None, None]
    start, lead, stride = ((d >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    modes = np.unique(descriptor >> np.uint64(62))
    if len(modes) != 1 or int(modes[0]) not in _SWIZZLES or (d >> 49 & 7).any():
        raise Unknown(f"the machine knows swizzled matrices without a base offset only, not modes {modes}")
    span, pieces = _SWIZZLES[int(modes[0])]
    row, k = rows[:, :, None], np.arange(K)
    if transposed:  # rows lie side by side
        across = span // 2
        offset = row // across * lead + row % across * 2 + k // 8 * stride + k % 8 * span
    else:
        offset = row // 8 * stride + row % 8 * span + 2 * k
    address = start + offset
    return address ^ (address >> 7 & pieces) << 4


class Flying:
    """Accumulators of products that have not been waited for: registers' names -> lanes, values."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Array, Array]] = {}

    def read(self, squad: Squad, name: str, registers: Array) -> Array:
        lanes, values = self._values.get(name, (None, None))
        return registers if lanes is None or values is None else np.where(lanes[:, None], values, registers)

    def start(self, squad: Squad, name: str, values: Array) -> None:
        lanes = self._values[name][0] if name in self._values else False
        self._values[name] = (lanes | squad.everyone(), values)

    def land(self, squad: Squad, name: str, values: Array) -> None:
        lanes, newest = self._values[name]
        if newest is values:
            self._values[name] = (lanes & ~squad.everyone(), values)


def check_unchanged(shared: Shared, cells: Array, writers: Array) -> None:
    """An operand that an asynchronous product may still be reading must not be written."""
    changed = cells[shared.writer[cells] != writers]
    if len(changed):
        place = int(changed[0]) * shared.granule % shared.size
        raise Race(f"byte {place} of shared memory was written before the product that reads it was waited for")


@operation("wgmma")
def _wgmma(s: Statement, o: Operands) -> Run:
    shape = next((m for m in s.modifiers if re.fullmatch(r"m64n\d+k16", m)), "")
    flags = s.flags("mma_async", "fence", "commit_group", "wait_group", "sync", "aligned", shape)
    if "fence" in flags:
        return lambda squad: None
    if "commit_group" in flags:
        return lambda squad: squad.products.commit(squad)
    if "wait_group" in flags:
        return lambda squad: squad.products.wait(squad, int(s.operands[0]))
    width, kind, name = int(shape[4:-3]), s.kinds[1], s.operands[0]
    in_registers = s.operands[1].startswith("{")
    a: Source = o.sources(s.operands[1], "b32") if in_registers else o.source(s.operands[1], "b64")
    b, adds = o.source(s.operands[2], "b64"), o.source(s.operands[3], "pred")
    signs, transposed = s.operands[4:6], [flag == "1" for flag in s.operands[6:]]
    if signs != ("1", "1") or s.kinds != ["f32", kind, kind] or kind not in ("f16", "bf16"):
        raise Unknown(f"the machine multiplies 16-bit numbers into float32 only, not `{s.text}`")
    sums, targets, places = o.sources(name, "f32"), o.targets(name, "f32"), _sums(width)

    def run(squad: Squad) -> None:
        squad.whole_warps()
        first = np.arange(0, squad.lanes, 32)
        warp = squad.thread[first] // 32

        def operand(descriptor: Array, rows: Array, flip: bool) -> tuple[Array, Array]:
            of_warps = np.broadcast_to(descriptor, squad.lanes)[first]
            if squad.mask is not None:  # what the others hold is no descriptor
                of_warps = np.where(squad.mask[first], of_warps, of_warps[squad.mask[first]][0])
            return squad.machine.shared.halves(squad, _addresses(of_warps, rows, flip))

        seen = []
        if in_registers:
            left = _matrix(_halves(a(squad), kind), _LEFT, 16, K)
        else:
            bits, cells = operand(a(squad), 16 * (warp[:, None] % 4) + np.arange(16), transposed[0])
            left, seen = decode(bits, kind).astype(np.float64), [cells]
        bits, cells = operand(b(squad), np.arange(width)[None], transposed[-1])
        right, seen = decode(bits, kind).astype(np.float64), [*seen, cells]
        before = squad.flying.read(squad, name, sums(squad))
        values = _multiplied(squad, left, right, np.where(adds(squad)[:, None], before, np.float32(0)), places)
        written = [squad.machine.shared.writer[cells] for cells in seen]
        squad.flying.start(squad, name, values)
        targets(squad, np.full_like(values, np.nan))

        def land() -> None:
            for cells, before in zip(seen, written, strict=True):
                check_unchanged(squad.machine.shared, cells, before)
            squad.flying.land(squad, name, values)
            targets(squad, values)

        squad.products.add(squad, land)

    return run
