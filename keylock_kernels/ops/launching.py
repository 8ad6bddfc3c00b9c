"""What every Triton file shares: the product, and the launch, which tests and the report can watch."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

# Triton reads the variable when it is imported; from then on its kernels run on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The interpreter multiplies the bit patterns of bfloat16 operands, and knows no bf16x6.
_INTERPRETED = tl.constexpr(INTERPRETED)

# Called with a kernel, its grid, arguments and options before a launch; True: there is no launch.
Observer = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], bool]
_observer: Observer | None = None
_assumed = "sm_80"  # the architecture that launchers see on a CPU


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which a kernel adds up what comes in `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def dot(a, b, acc):
    """a @ b + acc; operands of two widths meet in acc's, and float32 is multiplied in full."""
    if _INTERPRETED or acc.dtype == tl.float64:
        acc = tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    elif a.dtype != b.dtype:
        acc = tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="bf16x6")
    else:
        acc = tl.dot(a, b, acc, input_precision="bf16x6")
    return acc


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a device has; a large GPU's number where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """What a table of configurations calls a device: sm_90, gfx942; on a CPU what `observed` says."""
    return _architecture(device) if device.type == "cuda" else _assumed


def ceil_div(size: int, block: int) -> int:
    return -(-size // block)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Launches a kernel on a tensor's own device and current stream; an empty grid launches nothing.

    Products and sums are fused, whatever Triton's default is.

    Raises:
        RuntimeError: a CUDA graph is being captured and the kernel, so specialised, was never launched before.
    """
    if 0 in grid:
        return
    options["enable_fp_fusion"] = True
    if _observer is not None and _observer(kernel, grid, args, options):
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, device, args, options)
    else:
        _launch(kernel, grid, device, args, options)


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    if capturing(device):
        # Asked before rather than after: a refused load would spoil the capture, and leave Triton with a kernel that
        # it takes for loaded. Compiling it is allowed.
        if kernel.warmup(*args, grid=grid, **options).module is None:
            raise RuntimeError(
                f"{kernel.fn.__name__} has not been launched with such arguments before, and no kernel can be loaded "
                "while a CUDA graph is captured: before capturing, call once what is captured, with the same "
                "arguments. Which gradients are wanted, which options are None, which sizes and strides are 1 or "
                "divisible by 16, and which data lies at multiples of 16 bytes must not change in between"
            )
    kernel[grid](*args, **options)


@contextlib.contextmanager
def observed(observer: Observer, architecture: str | None = None) -> Iterator[None]:
    """Shows every launch inside the block to `observer` first; launchers on a CPU see the given architecture."""
    global _observer, _assumed
    outer, outer_architecture = _observer, _assumed
    _observer, _assumed = observer, architecture or _assumed
    try:
        yield
    finally:
        _observer, _assumed = outer, outer_architecture
