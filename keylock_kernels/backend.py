"""Which implementation an op takes on a device, and why not a faster one."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

BACKENDS = ("auto", "eager", "sdpa", "bmm", "native", "triton", "cuda")


def _native_missing() -> str | None:
    try:
        from . import native
    except ImportError as error:
        return f"the compiled module cannot be loaded ({error})"
    return None if native.available() else native.unavailable_reason() or "the compiled module is not available"


def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def _cuda_missing() -> str | None:
    from . import native_cuda

    return native_cuda.missing()


def _present() -> str | None:
    return None


def _proven(device: torch.device) -> str | None:
    return None


# Under Triton's interpreter its kernels run on CPU tensors, for tests.
_TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


# For which GPUs the tests of these very CUDA kernels have passed: what tests/kernels/gpu_record.py writes, committed.
_GPU_RECORD = Path(__file__).with_name("gpu_record.json")


@functools.cache
def _recorded_architectures() -> tuple[str, ...]:
    from . import native_cuda

    record = json.loads(_GPU_RECORD.read_text()) if _GPU_RECORD.exists() else {}
    sources = native_cuda.sources()
    return tuple(name for name, passed in record.items() if passed["sources"] == sources)


def _unproven(device: torch.device) -> str | None:
    """Why `auto` does not take CUDA kernels on a GPU, or None."""
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if torch.cuda.is_available() else "any GPU"
    return None if name in _recorded_architectures() else f"no passing GPU test record for {name} is on record"


def _unmeasured(device: torch.device) -> str | None:
    """Why `auto` does not take the C++ attention on this CPU, or None: docs/performance.md has the measurements."""
    from . import native

    if native.instruction_sets() == ("portable",):
        return "only its portable code runs on this CPU, which has not been measured to be the faster one"
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute one op."""

    op: str
    backend: str
    summary: str
    devices: tuple[str, ...] = ()  # device types; empty: any
    chosen_float64: bool = True  # whether "auto" takes it for float64
    caveat: str | None = None  # what explain() adds
    missing: Callable[[], str | None] = _present  # why it cannot run in this process
    dtypes: tuple[str, ...] = ()  # of the tensors it runs on; empty: any floating-point
    unproven: Callable[[torch.device], str | None] = _proven  # why "auto" passes it over on a device

    def refusal(self, device: str, dtype: torch.dtype | None = None) -> str | None:
        """Why this implementation cannot run on a device type, or for a dtype, or None."""
        if self.devices and device not in self.devices:
            return f"it runs on {', '.join(self.devices)} tensors only"
        if dtype is not None and self.dtypes and str(dtype).removeprefix("torch.") not in self.dtypes:
            return f"it computes in {', '.join(self.dtypes)} only, not in {str(dtype).removeprefix('torch.')}"
        return self.missing()


_NO_GPU_RUN = "checked in Triton's interpreter and as PTX executed on a CPU; no run on a GPU is on record yet"


def _cuda(op: str, summary: str) -> Implementation:
    """The CUDA C++ kernels, behind Triton's, whose backward they use, until measured to be faster."""
    return Implementation(
        op,
        "cuda",
        f"{summary}; gradients are Triton's",
        devices=("cuda",),
        missing=_cuda_missing,
        chosen_float64=False,
        dtypes=("float16", "bfloat16", "float32"),
        unproven=_unproven,
    )


def _linear(op: str) -> tuple[Implementation, ...]:
    """A layer with its updates: one family of kernels for both names."""
    return (
        Implementation(
            op,
            "native",
            "C++; without AVX-512 torch's GEMM, then the C++ update",
            devices=("cpu",),
            missing=_native_missing,
        ),
        Implementation(
            op,
            "triton",
            "one Triton GEMM with the updates in its epilogue",
            devices=_TRITON_DEVICES,
            missing=_triton_missing,
            chosen_float64=False,
            caveat=_NO_GPU_RUN,
        ),
        _cuda(op, "one CUDA C++ GEMM with the updates in its epilogue"),
        Implementation(op, "bmm", "torch's products of each row", chosen_float64=False),
        Implementation(op, "eager", "plain torch, one product per row, not rounded in between"),
    )


def _update(op: str) -> tuple[Implementation, ...]:
    """The updates of what a layer has computed."""
    return (
        Implementation(op, "native", "C++", devices=("cpu",), missing=_native_missing),
        Implementation(
            op,
            "triton",
            "one Triton kernel",
            devices=_TRITON_DEVICES,
            missing=_triton_missing,
            chosen_float64=False,
            caveat=_NO_GPU_RUN,
        ),
        _cuda(op, "one CUDA C++ kernel"),
        Implementation(op, "eager", "plain torch, one product per row"),
    )


# Fastest first: "auto" takes the first that is willing and able.
IMPLEMENTATIONS = (
    *_linear("rank_one_linear"),
    *_update("rank_one_update"),
    *_linear("low_rank_linear"),
    *_update("low_rank_update"),
    Implementation(
        "localized_attention",
        "native",
        "C++, all streams in one pass",
        devices=("cpu",),
        missing=_native_missing,
        chosen_float64=False,
        unproven=_unmeasured,
    ),
    Implementation(
        "localized_attention",
        "triton",
        "one Triton kernel, all streams in one pass",
        devices=_TRITON_DEVICES,
        missing=_triton_missing,
        chosen_float64=False,
        caveat=_NO_GPU_RUN,
    ),
    _cuda("localized_attention", "one CUDA C++ kernel, all streams in one pass"),
    Implementation(
        "localized_attention",
        "sdpa",
        "torch's scaled_dot_product_attention, one call per stream",
        chosen_float64=False,
    ),
    Implementation("localized_attention", "eager", "plain torch, the whole attention map in memory"),
)
OPS = tuple(dict.fromkeys(entry.op for entry in IMPLEMENTATIONS))


@torch.compiler.assume_constant_result
def choose(op: str, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend an op takes; raises ValueError where an explicit request cannot run."""
    if requested not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {requested!r}")
    candidates = [entry for entry in IMPLEMENTATIONS if entry.op == op]
    if requested == "auto":
        for entry in candidates:
            wanted = entry.chosen_float64 or dtype != torch.float64
            if wanted and entry.refusal(device.type, dtype) is None and entry.unproven(device) is None:
                return entry.backend
        raise ValueError(f"{op}: no implementation runs on {device.type} tensors")
    for entry in candidates:
        if entry.backend == requested:
            reason = entry.refusal(device.type, dtype)
            if reason is not None:
                raise ValueError(f"{op}: backend {requested!r} cannot run on {device.type} tensors: {reason}")
            return requested
    raise ValueError(
        f"{op}: backend {requested!r} has no implementation of this op; "
        f"it has {', '.join(entry.backend for entry in candidates)}"
    )


def explain() -> str:
    """Say which backend each op would take here, and why not a faster one.

    Returns:
        A text with one block per op and device type.

    Example:
        >>> from keylock_kernels import explain
        >>> "rank_one_update on cpu: " in explain()
        True
    """
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    return "\n".join(line for op in OPS for device in devices for line in _explain(op, device))


def _explain(op: str, device: str) -> list[str]:
    candidates = [entry for entry in IMPLEMENTATIONS if entry.op == op]
    taken = choose(op, "auto", torch.device(device), torch.float32)
    lines = [f"{op} on {device}: {taken}"]
    for entry in candidates:
        reason = entry.refusal(device)
        state = "available" if reason is None else f"not available: {reason}"
        lines.append(f"  {entry.backend}: {entry.summary}; {state}")
        unproven = entry.unproven(torch.device(device if device in entry.devices else "cuda"))
        for text in (entry.caveat, unproven and f"auto passes it over: {unproven}"):
            if text is not None:
                lines.append(f"    {text}")
        if not entry.chosen_float64:
            lines.append("    auto passes it over for float64 inputs, where exactness is what is wanted")
    absent = [name for name in BACKENDS[1:] if name not in {entry.backend for entry in candidates}]
    if absent:
        lines.append(f"  no implementation of this op: {', '.join(absent)}")
    return lines
