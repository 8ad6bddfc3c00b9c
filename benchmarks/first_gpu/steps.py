"""What the first run on a GPU does, step by step; each part fits into one call of ten minutes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

CALL = 590  # seconds that the steps of a part may take together
GRACE = 5  # seconds in which a step that has passed its limit may still write what it has
ALONE = {"PYTEST_ADDOPTS": ""}  # in one process
ON_GPU = {"KEYLOCK_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **ALONE}
# A tensor's neighbours in the caching allocator would hide an access behind its end.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Step:
    """One step, in a process of its own.

    Args:
        name: what STEP and the table call it.
        what: what it finds out.
        limit: seconds before it is ended.
        command: what runs on a GPU.
        stub: what runs without one, over the driver's stand-in; empty: nothing does.
        environ: more environment.
        keep: files of the checkout that are copied beside the results afterwards.
    """

    name: str
    what: str
    limit: int
    command: tuple[str, ...]
    stub: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.first_gpu.{name}", *arguments)


def _tests(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", *arguments)


def _sanitizer(tool: str) -> Step:
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    smoke = _module("smoke", "--dtypes", "bfloat16")
    return Step(tool, f"{tool} of compute-sanitizer finds nothing", 190, (*command, *smoke), environ=UNCACHED)


def _measure(what: str, limit: int, described: str) -> Step:
    return Step(what, described, limit, _module("timing", what), _module("timing", what, "--stub"))


_PROFILER = (
    "ncu", "--clock-control", "none", "-k", "regex:localized_attention_fwd", "-c", "2",
    "--section", "SpeedOfLight", "--section", "WarpStateStats", "--section", "Occupancy",
)  # fmt: skip
_OUTCOMES = ("build/gpu-outcomes.json", "build/collected", "keylock_kernels/gpu_record.json")

_RIGHT = (
    Step("probe", "compilers, headers, tools, the device", 20, _module("probe"), _module("probe", "--stub")),
    Step(
        "build",
        "the native module, with the CUDA kernels",
        80,
        (sys.executable, "setup.py", "-q", "build_ext", "--inplace"),
    ),
    Step(
        "smoke",
        "each kernel against float64, by eager's error",
        160,
        _module("smoke"),
        _module("smoke", "--stub", "--dtypes", "bfloat16"),
    ),
    Step(
        "capture",
        "CUDA graphs of both ops",
        50,
        _tests("tests/kernels/test_gpu.py", "-k", "captur"),
        (sys.executable, "-m", "tests.gpu_stub.capture"),
        ON_GPU,
    ),
    Step("tests", "make test-gpu", 240, ("make", "test-gpu", f"RUN={sys.executable}"), keep=_OUTCOMES[:2]),
    Step(
        "record",
        "every test of the CUDA kernels has passed",
        10,
        ("make", "gpu-record", f"RUN={sys.executable}"),
        keep=_OUTCOMES,
    ),
)
_FAST = (
    _measure("time", 85, "attention against its floor and SDPA"),
    _measure("sweep", 120, "stages and tiles per program of forward attention"),
    _measure("linear", 45, "layers against cuBLAS"),
    _measure("host", 30, "how long a call keeps Python busy"),
    Step("profile", "what forward attention waits for", 50, (*_PROFILER, *_module("timing", "time"))),
    Step(
        "bench",
        "the benchmarks that have a target",
        225,
        _tests("benchmarks", "--targets", "--no-compiled", "--benchmark-max-time=0.1", "--write-data"),
        environ=ALONE,  # or they would time each other
    ),
)
# A part's name, like a step's, can be given as STEP.
PARTS: dict[str, tuple[Step, ...]] = {
    "right": _RIGHT,
    "safe": tuple(map(_sanitizer, ("memcheck", "racecheck", "synccheck"))),
    "fast": _FAST,
}
STEPS = {step.name: step for part in PARTS.values() for step in part}


def chosen(names: list[str]) -> list[Step]:
    """The steps of the given names of steps and parts, in their order; of no names, all."""
    unknown = [name for name in names if name not in STEPS and name not in PARTS]
    if unknown:
        raise ValueError(f"STEP must be of {', '.join([*PARTS, *STEPS])}, got {' '.join(unknown)}")
    wanted = {step.name for name in names for step in PARTS.get(name, (STEPS.get(name),)) if step is not None}
    return [step for step in STEPS.values() if not names or step.name in wanted]
