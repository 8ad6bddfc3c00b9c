"""The text of one PTX kernel, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from .faults import Unknown

# Bytes of what an instruction's type names.
SIZES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
    "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip
VECTORS = {"v2": 2, "v4": 4}
_LABEL = re.compile(r"([$\w]+):\s*")
_STATEMENT = re.compile(
    r"(?:@(?P<not>!?)(?P<guard>%\w+)\s+)?(?P<opcode>[a-z]\w*(?:\.[\w:]+)*)\s*(?P<operands>.*)", re.S
)


@dataclass(frozen=True)
class Statement:
    guard: str  # the predicate that it depends on, or none
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    text: str

    def flags(self, *known: str) -> set[str]:
        """The modifiers that are no types; raises Unknown for one that is not among the known."""
        found = {m for m in self.modifiers if m not in SIZES and m not in VECTORS and m != "pred"}
        if found - set(known):
            raise Unknown(f"the machine does not know .{', .'.join(sorted(found - set(known)))} of `{self.text}`")
        return found

    @property
    def kinds(self) -> list[str]:
        return [m for m in self.modifiers if m in SIZES or m == "pred"]

    @property
    def count(self) -> int:
        """How many elements a load or store moves."""
        return next((VECTORS[m] for m in self.modifiers if m in VECTORS), 1)


def elements(operand: str) -> list[str]:
    """{a, b} as a and b."""
    return [part.strip() for part in operand.strip("{} \t\n").split(",")]


def _split(operands: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands) if part.strip())


class Program:
    """Statements, labels, parameters and registers of a kernel."""

    def __init__(self, text: str) -> None:
        head, _, rest = text[text.index(".entry") :].partition("\n{\n")
        self.name = re.split(r"\W+", head)[2]
        self.parameters = re.findall(rf"\b{re.escape(self.name)}_param_\d+", head)
        body = re.sub(r"//.*", "", rest[: rest.index("\n}\n")])
        body = re.sub(r"^\s*\.(?:loc|file)\b.*", "", body, flags=re.M)
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self._widths: dict[str, int] = {}  # of a register, or of all whose names begin so
        self.local = 0  # bytes of a thread's own memory
        for piece in body.split(";"):
            self._take(piece.strip())

    def _take(self, piece: str) -> None:
        while piece[:1] in ("{", "}") or _LABEL.match(piece):
            label = _LABEL.match(piece)
            if label:
                self.labels[label[1]] = len(self.statements)
            piece = piece[label.end() if label else 1 :].lstrip()
        if not piece or piece.startswith(".pragma"):
            return
        if declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", piece, re.S):
            for name in declared[2].split(","):
                self._widths[name.split("<")[0].strip()] = SIZES.get(declared[1], 0)
        elif depot := re.fullmatch(r"\.local\s+\.align\s+\d+\s+\.b8\s+__local_depot0\[(\d+)\]", piece):
            self.local = int(depot[1])
        elif found := _STATEMENT.fullmatch(piece):
            name, *modifiers = found["opcode"].split(".")
            self.statements.append(
                Statement(
                    found["guard"] or "", found["not"] == "!", name, tuple(modifiers), _split(found["operands"]),
                    " ".join(piece.split()),
                )
            )  # fmt: skip
        else:
            raise Unknown(f"{self.name}: the machine cannot read `{piece}`")

    def width(self, register: str) -> int:
        """Bytes of a register; a predicate has none."""
        found = self._widths.get(register, self._widths.get(register.rstrip("0123456789")))
        if found is None:
            raise Unknown(f"{self.name}: the register {register} is not declared")
        return found

    @cached_property
    def granules(self) -> dict[str, int]:
        """The smallest element, in bytes, of the accesses to global and to shared memory."""
        found = {"global": 8, "shared": 8}
        for s in self.statements:
            if s.name == "cp" and len(s.operands) > 1:
                sizes = {"global": int(s.operands[2], 0), "shared": int(s.operands[2], 0)}
            elif s.name in ("ld", "st") and "param" not in s.modifiers:
                size = SIZES[s.kinds[-1]]
                sizes = {space: size for space in found if space in s.modifiers or found.keys().isdisjoint(s.modifiers)}
            else:
                continue
            found |= {space: min(found[space], size) for space, size in sizes.items()}
        return found
