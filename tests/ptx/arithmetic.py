"""Instructions of one lane each: a statement becomes a function of the squad."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .faults import Unknown
from .program import SIZES, Statement, elements
from .values import Array, Operands, is_float

if TYPE_CHECKING:
    from .machine import Squad

Run = Callable[["Squad"], None]
Maker = Callable[[Statement, Operands], Run]
OPERATIONS: dict[str, Maker] = {}


def operation(*names: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        OPERATIONS.update(dict.fromkeys(names, maker))
        return maker

    return register


def _flushed(values: Array) -> Array:
    """Subnormal numbers as zeros."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def _elementwise(s: Statement, o: Operands, function: Callable[..., Array], kinds: list[str], flush: bool) -> Run:
    """The target is of the first kind, the sources of the others."""
    target = o.target(s.operands[0], kinds[0])
    sources = [o.source(name, kind) for name, kind in zip(s.operands[1:], kinds[1:], strict=True)]
    if flush:
        return lambda squad: target(squad, _flushed(function(*(_flushed(source(squad)) for source in sources))))
    if len(sources) == 1:
        (a,) = sources
        return lambda squad: target(squad, function(a(squad)))
    if len(sources) == 2:
        a, b = sources
        return lambda squad: target(squad, function(a(squad), b(squad)))
    return lambda squad: target(squad, function(*(source(squad) for source in sources)))


def _near(values: Array, bits: float) -> Array:
    """float32 numbers with a relative error of up to 2 ** -bits, the same for the same number."""
    mixed = (values.view(np.uint32) * np.uint32(0x9E3779B1) >> np.uint32(8)).astype(np.float64)
    return (values * (1 + (mixed / (1 << 23) - 1) * 2.0**-bits)).astype(np.float32)


# How near to the right number two instructions come, by the PTX manual.
_QUOTIENT_BITS, _POWER_BITS = 22.0, 22.5


def _either(
    s: Statement, o: Operands, exact: Callable[..., Array], near: Callable[..., Array], kinds: list[str], flush: bool
) -> Run:
    """As `_elementwise`, with another function on a machine that cuts off."""
    runs = [_elementwise(s, o, function, kinds, flush) for function in (exact, near)]
    return lambda squad: runs[squad.machine.terms is not None](squad)


_PLAIN = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "neg": np.negative, "abs": np.abs,
}  # fmt: skip


@operation(*_PLAIN, "max", "min")
def _plain(s: Statement, o: Operands) -> Run:
    flags, kind = s.flags("rn", "ftz"), s.kinds[-1]
    # A NaN beside a number is passed over.
    extremes = {"max": np.fmax, "min": np.fmin} if is_float(kind) else {"max": np.maximum, "min": np.minimum}
    return _elementwise(s, o, (_PLAIN | extremes)[s.name], [kind] * len(s.operands), "ftz" in flags)


_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@operation("mul", "mad")
def _product(s: Statement, o: Operands) -> Run:
    flags, kind = s.flags("lo", "wide", "rn", "ftz"), s.kinds[-1]
    wide = _WIDER[kind] if "wide" in flags else kind
    number = {"u32": np.uint32, "u64": np.uint64, "s32": np.int32, "s64": np.int64}.get(wide)

    def product(a: Array, b: Array, c: Array | None = None) -> Array:
        found = a.astype(number) * b.astype(number) if "wide" in flags else a * b
        return found if c is None else found + c

    kinds = [wide, kind, kind] + [wide] * (s.name == "mad")
    return _elementwise(s, o, product, kinds, "ftz" in flags)


def _sum_and_rest(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, rounded, and what that leaves, exactly."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _product_and_rest(a: Array, b: Array) -> tuple[Array, Array]:
    """The same of a * b, by halves of their digits."""
    (high, low), (top, rest) = (_halves(side) for side in (a, b))
    product = a * b
    return product, low * rest - (((product - high * top) - low * top) - high * rest)


def _halves(values: Array) -> tuple[Array, Array]:
    scaled = values * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - values)
    return high, values - high


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, rounded once: the least part is rounded to odd, so that the last rounding is the only one.

    Paper: Boldo and Melquiond 2008, Emulation of a FMA and correctly rounded sums, IEEE Trans. Computers 57(4).
    """
    with np.errstate(all="ignore"):
        product, rest = _product_and_rest(a, b)
        middle, least = _sum_and_rest(c, rest)
        high, low = _sum_and_rest(product, middle)
        odd, lost = _sum_and_rest(least, low)
        bits = np.ascontiguousarray(odd).view(np.int64)
        moved = bits + np.where((lost > 0) == (odd > 0), 1, -1)
        odd = np.where((lost != 0) & (bits % 2 == 0), moved, bits).view(np.float64)
        plain = product + c
        return np.where(np.isfinite(plain) & np.isfinite(high + odd), high + odd, plain)


@operation("fma")
def _fma(s: Statement, o: Operands) -> Run:
    flags, kind = s.flags("rn", "rm", "ftz"), s.kinds[-1]

    def fma(a: Array, b: Array, c: Array) -> Array:
        if kind == "f64":
            return fused(a, b, c)
        exact = a.astype(np.float64) * b.astype(np.float64) + c
        if "rm" not in flags:
            return exact if kind.startswith("bf") else exact.astype(a.dtype)
        nearest = exact.astype(np.float32)
        return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)

    return _elementwise(s, o, fma, [kind] * 4, "ftz" in flags)


@operation("div", "rem")
def _quotient(s: Statement, o: Operands) -> Run:
    flags, kind = s.flags("full", "rn", "ftz"), s.kinds[-1]

    def truncated(a: Array, b: Array) -> Array:
        wide, by = a.astype(np.int64), np.where(b == 0, -1, b.astype(np.int64))  # by zero: not specified
        found = np.abs(wide) // np.abs(by) * np.sign(wide) * np.sign(by)
        return wide - found * by if s.name == "rem" else found

    if "full" in flags:
        return _either(s, o, np.divide, lambda a, b: _near(a / b, _QUOTIENT_BITS), [kind] * 3, "ftz" in flags)
    return _elementwise(s, o, np.divide if is_float(kind) else truncated, [kind] * 3, "ftz" in flags)


@operation("ex2")
def _exponential(s: Statement, o: Operands) -> Run:
    flags = s.flags("approx", "ftz")

    def power(x: Array) -> Array:
        return np.exp2(x.astype(np.float64)).astype(np.float32)

    return _either(s, o, power, lambda x: _near(power(x), _POWER_BITS), ["f32"] * 2, "ftz" in flags)


@operation("shl", "shr")
def _shift(s: Statement, o: Operands) -> Run:
    s.flags()
    kind = s.kinds[-1]
    bits = 8 * SIZES[kind]

    def shift(a: Array, by: Array) -> Array:
        most = np.minimum(by, bits - 1).astype(a.dtype)
        found = a << most if s.name == "shl" else a >> most
        return found if kind.startswith("s") else np.where(by < bits, found, a.dtype.type(0))

    return _elementwise(s, o, shift, [kind, kind, "u32"], False)


@operation("bfe")
def _field(s: Statement, o: Operands) -> Run:
    s.flags()
    kind = s.kinds[-1]

    def field(a: Array, start: Array, length: Array) -> Array:
        by = np.uint32(32) - length
        return a << (by - start).astype(a.dtype) >> by.astype(a.dtype)

    if kind not in ("u32", "s32") or not all(n.isdigit() for n in s.operands[2:]):
        raise Unknown(f"the machine knows fields of fixed length in 32 bits only, not `{s.text}`")
    return _elementwise(s, o, field, [kind, kind, "u32", "u32"], False)


@operation("selp")
def _select(s: Statement, o: Operands) -> Run:
    s.flags()
    kind = f"b{8 * SIZES[s.kinds[-1]]}"
    return _elementwise(s, o, lambda a, b, p: np.where(p, a, b), [kind, kind, kind, "pred"], False)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "num": lambda a, b: ~np.isnan(a) & ~np.isnan(b), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip


@operation("setp")
def _compare(s: Statement, o: Operands) -> Run:
    (flag,) = s.flags(*_COMPARE, "neu", "equ", "ltu", "leu", "gtu", "geu")
    kind = s.kinds[-1]
    function = _COMPARE[flag if flag in _COMPARE else flag[:-1]]

    def compare(a: Array, b: Array) -> Array:
        found = function(a, b)
        if flag == "ne" and is_float(kind):
            return found & _COMPARE["num"](a, b)
        return found | _COMPARE["nan"](a, b) if flag not in _COMPARE else found

    if kind.endswith("x2"):
        targets = [o.target(name, "pred") for name in s.operands[0].split("|")]
        a, b = (o.source(name, kind) for name in s.operands[1:])

        def run(squad: Squad) -> None:
            for target, found in zip(targets, compare(a(squad), b(squad)).T, strict=True):
                target(squad, found)

        return run
    return _elementwise(s, o, compare, ["pred", kind, kind], False)


@operation("cvt")
def _convert(s: Statement, o: Operands) -> Run:
    flags = s.flags("rn", "ftz", "sat")
    to, came = s.kinds
    if len(s.operands) == 3:  # two numbers into a pair; the first is the upper half
        low, high, target = o.source(s.operands[2], came), o.source(s.operands[1], came), o.target(s.operands[0], to)
        return lambda squad: target(squad, np.stack(np.broadcast_arrays(low(squad), high(squad)), -1))
    if is_float(came) and not is_float(to):
        raise Unknown(f"the machine does not round to integers: `{s.text}`")

    def convert(a: Array) -> Array:
        # Saturation takes NaN to 0.
        return np.fmin(np.fmax(a, np.float32(0)), np.float32(1)) if "sat" in flags else a

    return _elementwise(s, o, convert, [to, came], "ftz" in flags)


@operation("mov", "cvta")
def _move(s: Statement, o: Operands) -> Run:
    s.flags("local")
    kind = s.kinds[-1]
    if kind == "pred":
        return _elementwise(s, o, lambda a: a, [kind] * 2, False)
    size = SIZES[kind]
    to, came = s.operands
    if to.startswith("{"):
        part = size // len(elements(to))
        whole, targets = o.bits(came, size), o.targets(to, f"b{8 * part}")
        shifts = np.arange(0, 8 * size, 8 * part, dtype=np.uint64)
        return lambda squad: targets(squad, whole(squad).astype(np.uint64)[:, None] >> shifts)
    target = o.target(to, f"b{8 * size}")
    if came.startswith("{"):
        parts = o.sources(came, f"b{8 * size // len(elements(came))}")
        return lambda squad: target(squad, parts(squad).view(f"u{size}")[:, 0])
    bits = o.bits(came, size)
    return lambda squad: target(squad, bits(squad))


@operation("prmt")
def _permute(s: Statement, o: Operands) -> Run:
    s.flags()
    selector = int(s.operands[3].rstrip("U"), 0)
    chosen = [selector >> 4 * byte & 15 for byte in range(4)]
    if max(chosen) > 7:
        raise Unknown(f"the machine does not spread signs: `{s.text}`")
    a, b, target = o.source(s.operands[1], "b32"), o.source(s.operands[2], "b32"), o.target(s.operands[0], "b32")

    def run(squad: Squad) -> None:
        pool = np.stack(np.broadcast_arrays(a(squad), b(squad)), -1).view(np.uint8)
        target(squad, np.ascontiguousarray(pool[:, chosen]).view(np.uint32)[:, 0])

    return run
