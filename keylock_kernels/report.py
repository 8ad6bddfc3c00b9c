"""``python -m keylock_kernels.report``: what the Triton kernels compile to, read from the machine code.

No GPU is needed. The report fails where a kernel spills, misses the matrix unit, moves what it should move wide in
narrow pieces, multiplies more padding than allowed, or has become worse than recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .machine_code import PROCESSORS, TARGETS, Compiled, compile_launches
from .testing import SHAPES, Shape, attention_inputs, low_rank_inputs, rank_one_inputs

RECORD = Path(__file__).resolve().parents[1] / "benchmarks" / "data" / "compiled.json"
WORSE = 1.03  # how much of a recorded number a new one may be
PORTABLE = 99 << 10  # bytes of shared memory that every GPU since Ampere gives a block
ROWS = 8  # of the batch that launchers are asked about
WITHOUT_MATRIX = ("given_update", "table_sum", "gate_part", "localized_attention_bwd_sum")


@dataclass(frozen=True)
class Case:
    """A call of launchers at a real model's shape."""

    name: str
    call: Callable[[], Any]
    quick: bool = False  # among those that the tests compile
    padding: float = 1.0  # matrix products issued over useful, forward
    allowed: float = 0.0  # and the most they may be; 0: not gated
    moved: int = 0  # bytes of queries and outputs of one tile of pixels
    backward: bool = True  # whether spills of its backward kernels fail


def failures(row: Compiled, case: Case) -> list[str]:
    """What a kernel must not do."""
    found = []
    nvidia_today = row.target in ("sm_90", "sm_100")
    forward = "_fwd_" in row.kernel
    if nvidia_today and (row.spills or row.stack) and (case.backward or "_bwd_" not in row.kernel):
        found.append(f"{row.spills} spills, {row.stack} bytes of stack")
    shared = {"sm_80": PORTABLE, "gfx942": 64 << 10}.get(row.target, PROCESSORS[row.target].shared)
    if row.shared > shared:
        found.append(f"{row.shared} bytes of shared memory, {shared} allowed")
    if row.matrix == 0 and not row.kernel.startswith(WITHOUT_MATRIX):
        found.append("no matrix unit")
    if forward and not row.target.startswith("gfx") and row.wide < 0.95:
        found.append(f"{row.wide:.0%} of the bytes of queries, keys, values and outputs in 128-bit accesses")
    if forward and case.allowed and case.padding > case.allowed:
        found.append(f"{case.padding:.2f} times the useful products, {case.allowed} allowed")
    if row.target == "sm_90" and row.resident < 8:
        bound = max(row.clocks.values())
        if not forward or bound > 1.1 * case.moved / PROCESSORS["sm_90"].memory:
            found.append(f"{row.resident} resident warps")
    return found


def _blank(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same call for more rows, of unfilled memory: only shapes and alignment are looked at."""
    return {
        k: v.new_empty(rows, *v.shape[1:]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }  # fmt: skip


FEATURES: dict[str, dict[str, Any]] = {
    "text": {},
    "1x4": dict(images=(4,), weights="pixel"),
    "4x4": dict(images=(4,) * 4, weights="pixel"),
    "8x4": dict(images=(4,) * 8, weights="pixel"),
    "4x16": dict(images=(16,) * 4, weights="pixel"),
    "regions": dict(regions=True),
    "maps": dict(read=4),
    "sums": dict(read=4, sums=True),
}
# At one width each: an image stream of many tokens, a long prompt, and everything at once.
MORE: dict[str, dict[str, Any]] = {
    "257": dict(images=(257,), weights="row"),
    "everything": dict(images=(4, 4), bias=True, regions=True, weights="pixel", read=4),
}
QUICK = {
    ("sd1.5", 4096): ("text", "4x4", "regions"),
    ("sd1.5", 1024): ("4x4",),
    ("sd1.5", 256): ("4x16",),
    ("sdxl", 4096): ("text", "4x16", "maps", "everything"),
}


def cases() -> Iterator[Case]:
    """Launcher calls at the shapes of Stable Diffusion 1.5 and XL, forward and backward."""
    yield from _attention_cases()
    yield from _rank_one_cases()
    yield from _low_rank_cases()


def _attention_cases() -> Iterator[Case]:
    shapes = [s for s in SHAPES if (s.model, s.pixels) in {*QUICK, ("sdxl", 1024)}]
    for shape in shapes:
        features = FEATURES | (MORE if shape.model == "sdxl" and shape.pixels == 4096 else {})
        for name, options in features.items():
            quick = name in QUICK.get((shape.model, shape.pixels), ())
            yield _attention_case(shape, name, options, torch.bfloat16, quick)
    for shape in shapes[:1]:
        for name in ("text", "4x4"):
            yield _attention_case(shape, name, FEATURES[name], torch.float32, False)


def _attention_case(shape: Shape, feature: str, options: dict[str, Any], dtype: torch.dtype, quick: bool) -> Case:
    from .ops.localized_attention import triton, triton_plan

    sizes = (shape.pixels, shape.tokens, shape.heads, shape.head_dim)
    inputs = _blank(attention_inputs(1, 1, *sizes[1:], dtype=dtype, **options), ROWS)
    for name in ("query", "query_regions", "readout_weights"):
        if name in inputs:
            inputs[name] = inputs[name].new_empty(ROWS, shape.pixels, *inputs[name].shape[2:])
    if options.get("weights") == "pixel":
        inputs["image_weights"] = inputs["image_weights"].new_empty(ROWS, len(options["images"]), shape.pixels)
    names = (
        "query", "key", "value", "scale", "key_bias", "query_regions", "key_regions", "image_key", "image_value",
        "image_lengths", "image_key_bias", "image_weights", "readout_tokens", "readout_weights",
    )  # fmt: skip
    arguments = [{"scale": 0.125, "image_lengths": [], **inputs}.get(name) for name in names]
    grad_readout = None
    if "read" in options:
        size = (ROWS, shape.heads, options["read"]) if "sums" in options else (ROWS, shape.heads, shape.pixels, 4)
        grad_readout = torch.empty(size)
    needs = [isinstance(arguments[p], torch.Tensor) for p in (0, 1, 2, 4, 7, 8, 10, 11, 13)]

    def call() -> None:
        triton.forward(*arguments)  # type: ignore[arg-type]
        grad = torch.empty_like(inputs["query"])
        triton.backward(grad, grad_readout, *arguments, needs=needs)  # type: ignore[arg-type,misc]

    images = options.get("images", ())
    few = 0 < sum(images) <= 8 and shape.head_dim == 40
    return Case(
        f"{shape.name} {feature} {str(dtype)[6:]}",
        call,
        quick,
        triton_plan.padding(dtype.itemsize, shape.head_dim, shape.tokens, images),
        (1.45 if few else 1.35 if images else 1.25) if dtype == torch.bfloat16 and not options.get("read") else 0.0,
        2 * 64 * shape.head_dim * dtype.itemsize,
        dtype != torch.float32,  # six products of 16-bit parts for one of 32 bits leave no room in registers
    )


def _rank_one_cases() -> Iterator[Case]:
    text = {(shape.text_width, shape.width): shape for shape in SHAPES if shape.model in ("sd1.5", "sdxl")}
    layers = [(f"{shape.model} to_k {width}", 77, inner, width) for (inner, width), shape in text.items()]
    layers += [("sd1.5 to_q 320", 4096, 320, 320), ("sdxl to_q 1280", 1024, 1280, 1280)]
    for name, tokens, inner, outer in layers:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = rank_one_inputs(2, tokens, inner, outer, 4, 2, dtype=dtype)
            quick = name == "sd1.5 to_k 320" and dtype == torch.bfloat16
            yield Case(f"{name} {str(dtype)[6:]}", _rank_one_calls(inputs), quick)


def _rank_one_calls(inputs: dict[str, Any]) -> Callable[[], Any]:
    from .ops.low_rank import triton
    from .ops.low_rank.updates import Updates

    x, weight, u, v, slots = (inputs[name] for name in ("x", "weight", "u", "v", "slots"))
    beta, tau, strength = (inputs[name] for name in ("beta", "tau", "strength"))
    gated = Updates(u, v, None, slots, beta, tau, strength, None, None, 1)
    given = gated._replace(down=None, beta=None, tau=None, strength=None)
    given = given._replace(coefficients=torch.empty(*x.shape[:2], slots.shape[1]))
    grad = torch.empty(*x.shape[:2], weight.shape[0], dtype=x.dtype)
    every = dict.fromkeys(("x", *Updates._fields[:-1]), True)

    def call() -> None:
        triton.linear(x, weight, inputs["bias"], None, gated)
        triton.linear_backward(grad, x, weight, gated, every | {"coefficients": False})
        triton.linear(x, weight, inputs["bias"], None, given)
        triton.update(grad, None, given)
        triton.update_backward(grad, None, given, every)

    return call


def _low_rank_cases() -> Iterator[Case]:
    """Adapters of 16 rows, one and two of them on a row, on part of the picture; 64 rows in two chunks."""
    for name, tokens, inner, outer, rank, slots in (
        ("sd1.5 to_q 320 rank 16", 4096, 320, 320, 16, 1),
        ("sd1.5 to_q 320 2 x rank 16", 4096, 320, 320, 16, 2),
        ("sdxl ff 10240 rank 16", 1024, 1280, 10240, 16, 1),
        ("sdxl to_k 1280 rank 64", 77, 2048, 1280, 64, 2),
    ):
        for dtype in (torch.bfloat16, torch.float32) if (slots, outer) == (1, 320) else (torch.bfloat16,):
            inputs = low_rank_inputs(2, tokens, inner, outer, (rank,) * 4, slots, dtype=dtype)
            quick = name == "sd1.5 to_q 320 rank 16" and dtype == torch.bfloat16
            yield Case(f"{name} {str(dtype)[6:]}", _low_rank_calls(inputs, rank), quick)


def _low_rank_calls(inputs: dict[str, Any], rank: int) -> Callable[[], Any]:
    from .ops.low_rank import triton
    from .ops.low_rank.updates import Updates

    x, weight, scale = (inputs[name] for name in ("x", "weight", "output_scale"))
    up, down, offsets, slots = (inputs[name] for name in ("up", "down", "offsets", "slots"))
    updates = Updates(up, down, offsets, slots, None, None, inputs["strength"], inputs["token_weights"], None, rank)
    grad = torch.empty(*x.shape[:2], weight.shape[0], dtype=x.dtype)
    every = dict.fromkeys(("x", *Updates._fields[:-1]), True) | {"coefficients": False}

    def call() -> None:
        triton.linear(x, weight, inputs["bias"], scale, updates)
        triton.linear_backward(grad, x, weight, updates, every)
        triton.update(grad, x, updates)
        triton.update_backward(grad, x, updates, every)

    return call


def compare(rows: list[Compiled], path: Path = RECORD) -> list[str]:
    """What is worse than recorded by more than 3%; nothing where another Triton made the record, or none did."""
    import triton

    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("triton") != triton.__version__:
        return []
    old = {_key(row): row for row in record["rows"]}
    found = []
    for row in map(asdict, rows):
        before = old.get(_key(row), row)
        for name in ("registers", "stack", "spills", "shared", "matrix", "exponentials", "instructions", "narrow"):
            if row[name] > WORSE * before[name]:
                found.append(f"{_key(row)}: {name} {before[name]} -> {row[name]}")
        for name in ("wide", "resident"):
            if WORSE * row[name] < before[name]:
                found.append(f"{_key(row)}: {name} {before[name]} -> {row[name]}")
    return found


def record(rows: list[Compiled], path: Path = RECORD) -> None:
    """Writes the rows, in the place of older ones of the same cases and targets."""
    import triton

    old = json.loads(path.read_text()) if path.exists() else {}
    kept = old["rows"] if old.get("triton") == triton.__version__ else []
    fresh = {(row.case, row.target) for row in rows}
    every = [row for row in kept if (row["case"], row["target"]) not in fresh] + [asdict(row) for row in rows]
    every.sort(key=lambda row: (row["case"], row["target"]))
    lines = ",\n".join(json.dumps(row) for row in every)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


def _key(row: dict[str, Any]) -> str:
    return f"{row['case']} {row['kernel']} {row['target']} {row['variant']}"


HEAD = (
    f"{'case':36} {'kernel':12} {'target':6} regs stack spills shared warps resident unit          "
    "128-bit others padding   matrix      exp    issue   DRAM clocks"
)


def line(row: Compiled, case: Case) -> str:
    clocks = " ".join(f"{value:8.0f}" for value in row.clocks.values())
    forward = "_fwd_" in row.kernel
    ends = f"{case.padding:7.2f} {clocks} {case.moved / PROCESSORS[row.target].memory:6.0f}" if forward else (
        f"{'':7} {clocks}"
    )  # fmt: skip
    short = row.kernel.removeprefix("localized_attention_").removesuffix("_kernel")
    return (
        f"{row.case:36} {short:12} {row.target:6} {row.registers:4} {row.stack:5} {row.spills:6} {row.shared:6} "
        f"{row.warps:5} {row.resident:8} {row.unit:13} {row.wide:7.0%} {row.narrow:6} {ends}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m keylock_kernels.report", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--record", action="store_true", help=f"write the rows to {RECORD.name}")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does unset; set, it does not warn
    rows: list[Compiled] = []
    failed = 0
    print(HEAD)
    for case in cases():
        if arguments.only not in case.name:
            continue
        for target in arguments.targets:
            for row in compile_launches(case.call, target, case.name):
                rows.append(row)
                bad = failures(row, case)
                failed += bool(bad)
                print(line(row, case) + (f"  FAILS: {'; '.join(bad)}" if bad else ""), flush=True)
    if arguments.record:
        record(rows)
    worse = compare(rows)
    for text in worse:
        print(f"worse than recorded: {text}")
    print(f"{len(rows)} kernels, {failed} fail, {len(worse)} numbers worse than recorded")
    return 1 if failed or worse else 0


if __name__ == "__main__":
    sys.exit(main())
