"""What the bits of registers mean, and how instructions read and write them: one number a lane.

A register that all lanes have in common may be an array of one; NumPy broadcasts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import Unknown
from .program import SIZES, Program, elements

if TYPE_CHECKING:
    from .machine import Squad

Array = np.ndarray[Any, Any]
Source = Callable[["Squad"], Array]
Target = Callable[["Squad", Array], None]

BITS: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NUMBERS: dict[str, type] = {
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "f16": np.float16, "f32": np.float32,
    "f64": np.float64,
}  # fmt: skip
# Registers that the hardware fills, as attributes of a squad.
SPECIAL = {"%tid.x": "thread"} | {f"%{of}ctaid.{axis}": f"{of}block_{axis}" for of in ("", "n") for axis in "xyz"}
LOCAL = 1 << 24  # where a thread's own memory lies, far below any tensor


def is_float(kind: str) -> bool:
    return kind.lstrip("b").startswith("f")


def bfloat16(bits: Array) -> Array:  # uint16 -> float32
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:  # -> uint16, rounded to nearest, ties to even
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def decode(bits: Array, kind: str) -> Array:
    """Numbers to compute with; bfloat16 as float32, a packed pair as two columns."""
    if kind == "pred":
        return bits
    if kind.endswith("x2"):
        return decode(np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2), kind[:-2])
    return bfloat16(bits) if kind == "bf16" else bits.view(NUMBERS.get(kind, BITS[SIZES[kind]]))


def encode(values: Array, kind: str) -> Array:
    """The bits of what was computed, rounded once."""
    if kind == "pred":
        return values
    if kind.endswith("x2"):
        return np.ascontiguousarray(encode(values, kind[:-2])).view(np.uint32)[:, 0]
    size = SIZES[kind]
    if kind == "bf16":
        return to_bfloat16(values)
    return values.astype(NUMBERS.get(kind, BITS[size]), copy=False).view(BITS[size])


class Operands:
    """Makes readers and writers of a program's operands."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def bits(self, operand: str, size: int) -> Source:
        """Reader of so many bytes; of a narrower register, filled up with zeros. Size 0 is a predicate."""
        if operand in SPECIAL:
            return lambda squad: getattr(squad, SPECIAL[operand]).astype(BITS[size])
        if operand.startswith("%"):
            if self.program.width(operand) == size:
                return lambda squad: squad.registers[operand]
            return lambda squad: squad.registers[operand].astype(BITS[size])
        if size == 0:
            constant = np.array([int(operand) != 0])
        else:
            constant = np.array([_constant(operand) & ((1 << 8 * size) - 1)], BITS[size])
        return lambda squad: constant

    def source(self, operand: str, kind: str) -> Source:
        bits = self.bits(operand, SIZES.get(kind, 0))
        return lambda squad: decode(bits(squad), kind)

    def sources(self, operand: str, kind: str) -> Callable[[Squad], Array]:
        """Reader of {a, b, ...}: [lanes, registers]."""
        readers = [self.source(name, kind) for name in elements(operand)]

        def read(squad: Squad) -> Array:
            found = np.empty((squad.lanes, len(readers)), NUMBERS.get(kind, BITS[SIZES[kind]]))
            for column, reader in enumerate(readers):
                found[:, column] = reader(squad)
            return found

        return read

    def target(self, operand: str, kind: str) -> Target:
        if operand == "_":
            return lambda squad, values: None
        width = self.program.width(operand)
        signed = kind.startswith("s")

        def write(squad: Squad, values: Array) -> None:
            bits = encode(values, kind)
            if bits.itemsize != width and width:
                bits = (bits.view(NUMBERS[kind]) if signed else bits).astype(BITS[width])
            if squad.mask is not None:
                bits = np.where(squad.mask, bits, squad.registers[operand])
            squad.registers[operand] = bits

        return write

    def targets(self, operand: str, kind: str) -> Target:
        """Writer of {a, b, ...} from [lanes, registers]."""
        writers = [self.target(name, kind) for name in elements(operand)]

        def write(squad: Squad, values: Array) -> None:
            for column, writer in enumerate(writers):
                writer(squad, np.ascontiguousarray(values[:, column]))

        return write

    def address(self, operand: str) -> Source:
        """Reader of [register + offset]: int64 for every lane."""
        base, _, offset = operand.strip("[] ").partition("+")
        base, step = base.strip(), np.int64(int(offset or "0", 0))
        if base.startswith("%"):
            return lambda squad: np.broadcast_to(squad.registers[base].astype(np.int64) + step, squad.lanes)
        start = np.int64(_constant(base)) + step
        return lambda squad: np.full(squad.lanes, start)


def _constant(text: str) -> int:
    if text == "global_smem":
        return 0
    if text == "__local_depot0":
        return LOCAL
    try:
        return int(text[2:], 16) if text[:2] in ("0f", "0F", "0d", "0D") else int(text.rstrip("U"), 0)
    except ValueError:
        raise Unknown(f"the machine does not know the operand {text}") from None
