"""``python -m keylock_kernels.report``: what the Triton kernels compile to, read from the machine code.

No GPU is needed: the launchers run on CPU tensors, and each launch is compiled for a target instead,
specialised for the alignment of pointers and strides exactly as it would be on that GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .testing import SHAPES, rank_one_inputs

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# A block's registers and shared memory must leave room for 8 warps on a multiprocessor of this size.
_REGISTERS, _SHARED = 65536, {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Compiled:
    """One kernel of one case on one target."""

    case: str
    kernel: str
    target: str
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # instructions that store to or load from local memory
    shared: int  # bytes per block
    warps: int  # per block
    matrix: int  # matrix-unit instructions
    wide: int  # 128-bit accesses to global memory
    narrow: int  # narrower ones

    def failures(self) -> list[str]:
        """What a kernel must not do."""
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} spills, {self.stack} bytes of stack")
        if self.shared > _SHARED[self.target]:
            found.append(f"{self.shared} bytes of shared memory, {_SHARED[self.target]} there are")
        if self.matrix == 0 and not self.kernel.startswith(("table_sum", "gate_part")):
            found.append("no matrix unit")
        return found


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


def compile_launches(call: Callable[[], Any], target: str, case: str) -> list[Compiled]:
    """Every kernel that `call` would launch, compiled for a target; what `call` returns is meaningless.

    Args:
        call: calls launchers on CPU tensors.
        target: one of TARGETS.
        case: names the rows.
    """
    from triton.runtime.driver import driver

    from .ops import launching

    found: list[Compiled] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        compiled = kernel.warmup(*args, grid=grid, **options)
        warps = options.get("num_warps", 4)
        found.append(Compiled(case, kernel.fn.__name__, target, warps=warps, **_read(compiled, target)))
        return True

    outer = driver._active  # reading `driver.active` would look for a GPU
    driver.set_active(_Target(target))  # type: ignore[arg-type]
    try:
        with launching.observed(record, target):
            call()
    finally:
        driver._active = outer
    return found


def _read(compiled: Any, target: str) -> dict[str, int]:
    return _read_amd(compiled) if target.startswith("gfx") else _read_nvidia(compiled)


def _read_nvidia(compiled: Any) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.M)

    def count(pattern: str) -> int:
        return sum(1 for opcode in opcodes if re.match(pattern, opcode))

    def used(name: str) -> int:
        return max((int(number) for number in re.findall(rf"{name}:(\d+)", usage)), default=0)

    wide = count(r"(LDG|LDGSTS|STG).*\.128")
    return {
        "registers": used("REG"),
        "stack": used("STACK"),
        "spills": count("LDL|STL"),
        "shared": compiled.metadata.shared,
        "matrix": count(r"HMMA|HGMMA|UTC\w*MMA|DMMA"),
        "wide": wide,
        "narrow": count("LDG|LDGSTS|STG") - wide,
    }


def _read_amd(compiled: Any) -> dict[str, int]:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int((re.findall(rf"\.{name}:\s*(\d+)", code) or ["0"])[-1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", code, re.M))

    wide = count(r"(?:global|buffer)_(?:load|store)_dwordx4")
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "shared": compiled.metadata.shared,
        "matrix": count("v_mfma"),
        "wide": wide,
        "narrow": count(r"(?:global|buffer)_(?:load|store)_") - wide,
    }


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launcher calls at the shapes of real models, forward and backward."""
    from .ops.rank_one import triton as rank_one

    text = {(shape.text_width, shape.width): shape for shape in SHAPES if shape.model in ("sd1.5", "sdxl")}
    layers = [(f"{shape.model} to_k {width}", 77, inner, width) for (inner, width), shape in text.items()]
    layers += [("sd1.5 to_q 320", 4096, 320, 320), ("sdxl to_q 1280", 1024, 1280, 1280)]
    for name, tokens, inner, outer in layers:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = rank_one_inputs(2, tokens, inner, outer, 4, 2, dtype=dtype)
            yield f"{name} {str(dtype)[6:]}", _rank_one_calls(rank_one, inputs)


def _rank_one_calls(rank_one: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    names = ("x", "weight", "u", "v", "slots", "bias", "beta", "tau", "strength")
    x, weight, u, v, slots, _, *gate = (inputs[name] for name in names)
    grad = torch.empty(*x.shape[:2], weight.shape[0], dtype=x.dtype)
    given = torch.empty(*x.shape[:2], slots.shape[1])
    needs = dict.fromkeys(("x", "u", "v", "beta", "tau", "strength"), True) | {"coefficients": False}

    def call() -> None:
        rank_one.linear(*(inputs[name] for name in names), None)
        rank_one.linear_backward(grad, x, weight, u, v, slots, *gate, None, needs)
        rank_one.linear(x, weight, u, None, slots, inputs["bias"], None, None, None, given)
        rank_one.update(grad, u, slots, given)
        rank_one.update_backward(grad, u, slots, given, True, True)

    return call


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m keylock_kernels.report", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does unset; set, it does not warn
    rows, failed = [], 0
    print(f"{'case':32} {'kernel':20} {'target':7} regs stack spills shared warps matrix 128-bit narrower")
    for case, call in cases():
        for target in arguments.targets:
            for row in dict.fromkeys(compile_launches(call, target, case)):
                rows.append(row)
                bad = row.failures()
                failed += bool(bad)
                print(
                    f"{row.case:32} {row.kernel:20} {row.target:7} {row.registers:4} {row.stack:5} {row.spills:6} "
                    f"{row.shared:6} {row.warps:5} {row.matrix:6} {row.wide:7} {row.narrow:8}"
                    + (f"  FAILS: {'; '.join(bad)}" if bad else ""),
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"{len(rows)} kernels, {failed} fail")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
