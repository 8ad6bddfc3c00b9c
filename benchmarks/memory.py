"""How much memory a call takes at its highest, beside what was there before."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import DEVICE


def peak_bytes(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """What a call returns, and the most that it took: of torch's memory on a GPU, else the process's resident set.

    None where the system does not tell: on a CPU without Linux and glibc.
    """
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        result = call()
        return result, torch.cuda.max_memory_allocated(DEVICE) - before
    process = Path("/proc/self")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one takes
        (process / "clear_refs").write_text("5")  # the highest resident set begins anew
    except (OSError, AttributeError):
        return call(), None
    before = _resident(process, "VmRSS")
    result = call()
    return result, _resident(process, "VmHWM") - before


def _resident(process: Path, field: str) -> int:
    lines = (process / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
