"""Compiles the launches of a call for a GPU that is not there, and reads the machine code.

The launchers run on CPU tensors; each launch is compiled instead, specialised for the alignment of pointers and
strides exactly as it would be on that GPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops.launching import Observer

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Processor:
    """A multiprocessor, as published; rates are per clock."""

    shared: int  # bytes a block may have
    shared_of_all: int  # bytes for all blocks together
    registers: int
    warps: int
    blocks: int
    matrix: int  # 16-bit FLOP
    exponentials: int
    issue: int  # warp instructions
    memory: float  # bytes of DRAM that are its share


# A100 80 GB, H200, B200, MI300X: bandwidth over multiprocessors and boost clock.
PROCESSORS = {
    "sm_80": Processor(163 << 10, 164 << 10, 65536, 64, 32, 2048, 16, 4, 2.04e12 / 108 / 1.41e9),
    "sm_90": Processor(227 << 10, 228 << 10, 65536, 64, 32, 4096, 16, 4, 4.8e12 / 132 / 1.83e9),
    "sm_100": Processor(227 << 10, 228 << 10, 65536, 64, 32, 8192, 16, 4, 8.0e12 / 148 / 1.85e9),
    "gfx942": Processor(64 << 10, 64 << 10, 131072, 32, 32, 2048, 16, 4, 5.3e12 / 304 / 2.1e9),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel of one case on one target. Counts are of instructions in the code, each once, loops or not."""

    case: str
    kernel: str
    target: str
    variant: int  # of the kernels of that name that the case compiles, in order
    registers: int  # per thread
    stack: int  # bytes per thread that the code touches
    spills: int  # instructions that store to or load from local memory
    shared: int  # bytes per block
    warps: int  # per block
    resident: int  # warps per multiprocessor
    matrix: int  # matrix-unit instructions
    unit: str  # and their kind
    matrix_flops: int  # of a block, one pass through the code; 0 where the code does not tell
    exponentials: int
    instructions: int
    wide: float  # share of the bytes of queries, keys, values and outputs moved by 128-bit accesses
    narrow: int  # accesses of other tensors: masks, biases, slopes, read-outs

    @property
    def clocks(self) -> dict[str, float]:
        """What one pass through a block's code keeps each unit of a multiprocessor busy, at least."""
        p = PROCESSORS[self.target]
        return {
            "matrix": self.matrix_flops / p.matrix,
            "exp": self.exponentials * 32 * self.warps / p.exponentials,
            "issue": self.instructions * self.warps / p.issue,
        }


class _Target:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        is_amd = name.startswith("gfx")
        self.target = GPUTarget("hip", name, 64) if is_amd else GPUTarget("cuda", int(name[3:]), 32)
        self.device = TARGETS.index(name)  # Triton keeps compiled kernels by device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextlib.contextmanager
def launches_seen(observer: Observer, target: str) -> Iterator[None]:
    """Shows every launch inside the block to `observer`, for which Triton then compiles for `target`."""
    from triton.runtime.driver import driver

    from .ops import launching

    outer = driver._active  # reading `driver.active` would look for a GPU
    driver.set_active(_Target(target))  # type: ignore[arg-type]
    try:
        with launching.observed(observer, target):
            yield
    finally:
        driver._active = outer


def compile_launches(call: Callable[[], Any], target: str, case: str) -> list[Compiled]:
    """Every kernel that `call` would launch, compiled for a target, once; what `call` returns is meaningless.

    Args:
        call: calls launchers on CPU tensors.
        target: one of TARGETS.
        case: names the rows.
    """
    found: list[Compiled] = []
    seen: set[tuple[str, int, int]] = set()

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        compiled = kernel.warmup(*args, grid=grid, **options)
        warps = options.get("num_warps", 4)
        named: dict[str, Any] = dict(zip(kernel.arg_names, args, strict=False))
        passes = named["per_group"] if "per_group" in named else named.get("per_share", 1)
        if (compiled.hash, warps, passes) in seen:
            return True
        seen.add((compiled.hash, warps, passes))
        facts = (_read_amd if target.startswith("gfx") else _read_nvidia)(compiled, warps, passes)
        resident = _resident(PROCESSORS[target], facts["registers"], facts["shared"], warps, target)
        row = Compiled(case, kernel.fn.__name__, target, 0, warps=warps, resident=resident, **facts)
        alike = [r for r in found if r.kernel == row.kernel]
        if row not in (replace(r, variant=0) for r in alike):
            found.append(replace(row, variant=len(alike)))
        return True

    with launches_seen(record, target):
        call()
    return found


def _resident(p: Processor, registers: int, shared: int, warps: int, target: str) -> int:
    """Warps of a multiprocessor that blocks of this kernel can fill."""
    if shared > p.shared:
        return 0
    if target.startswith("gfx"):  # 4 SIMDs of 512 registers a lane, given in eights
        blocks = min(8, 512 // (-(-max(registers, 1) // 8) * 8)) * 4 // warps
    else:  # a warp is given registers in units of 256, a block 1 KiB of shared memory besides its own
        blocks = min(p.registers // (-(-registers * 32 // 256) * 256) // warps, p.warps // warps, p.blocks)
        shared += 1 << 10
    return min(blocks, p.shared_of_all // shared if shared else blocks) * warps


# Functions that move queries, keys, values, activations, weights and outputs; and who calls them for what.
_DENSE = ("load_part", "store_part", "activations_of", "load_weight", "store_output")
_KEYS = ("key_tile", "asked_tokens")
_IMAGES = ("resident_images", "_add_long", "_add_group", "_add_equal", "_images", "_image_chunk")


@functools.cache
def _lines() -> dict[tuple[str, int], str]:
    """By file and line, the kernels' function of the names above that the line belongs to."""
    from .ops.localized_attention import triton_backward, triton_forward, triton_keys, triton_tiles
    from .ops.low_rank import triton_updates

    found = {}
    for module in (triton_tiles, triton_forward, triton_backward, triton_keys, triton_updates):
        for name in (*_DENSE, *_KEYS, *_IMAGES):
            function = getattr(module, name, None)
            if function is not None and function.fn.__module__ == module.__name__:
                source, first = inspect.getsourcelines(function.fn)
                for number in range(first, first + len(source)):
                    found[Path(inspect.getfile(function.fn)).name, number] = name
    return found


@dataclass
class _Accesses:
    """Bytes of the dense accesses to global memory, and how many others there are."""

    pixels: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    others: int = 0

    def add(self, chain: set[tuple[str, int]], size: int) -> None:
        names = {_lines().get(place) for place in chain}
        if not names & set(_DENSE):
            self.others += 1
        elif not names & set(_IMAGES):  # short image streams are too small for wide accesses
            (self.keys if names & set(_KEYS) else self.pixels).append(size)

    def wide(self, passes: int) -> float:
        """The share of bytes in 16-byte accesses, where pixels are passed over several times and keys once."""
        bytes_of = {
            which: passes * sum(s for s in self.pixels if which(s)) + sum(s for s in self.keys if which(s))
            for which in (lambda s: True, lambda s: s == 16)
        }
        every, wide = bytes_of.values()
        return wide / every if every else 1.0


def _nvidia_tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, cwd=cwd).stdout


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_PLACE = re.compile(r'"([^"]*)", line (\d+)')
_MMA = {"16816": 4096, "1688": 2048, "1684": 1024}  # FLOP of a warp


def _read_nvidia(compiled: Any, warps: int, passes: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        code = _nvidia_tool("nvdisasm", "--print-line-info-inline", "-c", file.name)
    accesses = _Accesses()
    chain: set[tuple[str, int]] = set()
    told = False
    opcodes: list[str] = []
    frame = flops = 0  # accesses relative to the stack; FLOP
    for line in code.splitlines():
        if "//## File" in line:
            chain = chain if told else set()
            chain |= {(Path(name).name, int(number)) for name, number in _PLACE.findall(line)}
            told = True
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        told = False
        opcode, operands = instruction[1], instruction[2]
        opcodes.append(opcode)
        frame += "[R1+" in operands or "[R1]" in operands
        if re.match(r"(LDG|LDGSTS|STG)\b", opcode):
            width = re.search(r"\.(128|64|U16|U8|S16|S8)\b", opcode)
            size = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4
            accesses.add(chain, size)
        if opcode.startswith("HMMA"):
            flops += _MMA.get(opcode.split(".")[1], 0) * warps
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
            flops += 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * warps // 4

    def count(pattern: str) -> int:
        return sum(1 for opcode in opcodes if re.match(pattern, opcode))

    def used(name: str) -> int:
        return max((int(number) for number in re.findall(rf"{name}:(\d+)", usage)), default=0)

    names = {"HMMA": "HMMA", "HGMMA": "HGMMA", "tcgen05": r"UTC\w*MMA", "DMMA": "DMMA"}
    units = [unit for unit, pattern in names.items() if count(pattern)]
    spills = count("LDL|STL")
    return {
        "registers": used("REG"),
        # ptxas may reserve a frame for a predicate that it then keeps in a register: nothing touches it.
        "stack": used("STACK") if spills or frame else 0,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "matrix": count(r"HMMA|HGMMA|UTC\w*MMA|DMMA"),
        "unit": "+".join(units) or "none",
        "matrix_flops": flops,
        "exponentials": count(r"MUFU\.EX2"),
        "instructions": len(opcodes),
        "wide": accesses.wide(passes),
        "narrow": accesses.others,
    }


_AMD_SIZES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


def _read_amd(compiled: Any, warps: int, passes: int) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    # Its text names the line of an instruction, but not what was inlined where: pixels and keys are not told apart.
    files = dict(re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', code))
    chain: set[tuple[str, int]] = set()
    accesses = _Accesses()
    for line in code.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            chain = {(Path(files.get(place[1], "")).name, int(place[2]))}
        if access := re.match(r"\s+(?:global|buffer)_(?:load|store)_(?:lds_)?([a-z0-9]+)", line):
            accesses.add(chain, _AMD_SIZES.get(access[1], 2))

    def number(name: str) -> int:
        return int((re.findall(rf"\.{name}:\s*(\d+)", code) or ["0"])[-1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", code, re.M))

    matrix = count("v_mfma")
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "shared": compiled.metadata.shared,
        "matrix": matrix,
        "unit": "MFMA" if matrix else "none",
        "matrix_flops": 0,
        "exponentials": count("v_exp_f32"),
        "instructions": count(r"(?:[sv]_|ds_|global_|buffer_)\w+"),
        "wide": accesses.wide(passes),
        "narrow": accesses.others,
    }


@dataclass(frozen=True)
class CudaKernel:
    """A kernel of csrc/cuda as it lies in the compiled module."""

    name: str
    target: str
    registers: int  # per thread
    stack: int  # bytes per thread
    opcodes: tuple[str, ...]  # in the code, each once, loops or not

    def count(self, pattern: str) -> int:
        return sum(1 for opcode in self.opcodes if re.match(pattern, opcode))


def cuda_kernels(module: Path) -> list[CudaKernel]:
    """The kernels for every architecture that a module or object file holds machine code for."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _nvidia_tool("cuobjdump", "-xelf", "all", str(module.resolve()), cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            target = re.findall(r"sm_\d+", cubin.name)[-1]
            usage = re.findall(
                r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", _nvidia_tool("cuobjdump", "-res-usage", str(cubin))
            )
            code = re.split(r"^\.text\.(\S+):$", _nvidia_tool("nvdisasm", "-c", str(cubin)), flags=re.M)
            texts = dict(zip(code[1::2], code[2::2], strict=True))
            for name, registers, stack in usage:
                opcodes = tuple(m[1] for m in map(_INSTRUCTION.match, texts[name].splitlines()) if m)
                found.append(CudaKernel(name, target, int(registers), int(stack), opcodes))
    return found
