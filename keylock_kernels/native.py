"""Finds and loads the compiled kernels of csrc/, and says what they are and why they are not there.

Nothing here raises because the extension is missing except the ops themselves.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_NAME = "keylock_kernels._native"
_RECORD = Path(__file__).with_name("_build.json")  # what setup.py decided
_OPENMP_RUNTIME = re.compile(r"lib[gi]?omp5?(-[0-9a-f]+)?\.so")


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        # First, so that the extension's libgomp.so.1 is the one torch brought and they share threads.
        import torch  # noqa: F401
    except Exception:
        pass  # build_info() is for telling what is wrong, a broken torch included
    try:
        return importlib.import_module(_NAME), None
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            return None, f"cannot be loaded: {error}"
        return None, _build_record()["native"]["reason"]
    except ImportError as error:
        return None, f"cannot be loaded: {error}"


def _build_record() -> dict[str, Any]:
    try:
        return json.loads(_RECORD.read_text())
    except FileNotFoundError:
        unbuilt = {"built": False, "reason": "not built: install the package, or run `make`"}
        return {"native": unbuilt, "cuda": {**unbuilt, "architectures": []}}


def available() -> bool:
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """Why `available()` is False, in one line; None where it is True."""
    return _load()[1]


def _extension() -> ModuleType:
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(f"native kernels are not available: {reason}")
    return extension


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets the kernels are compiled for and this machine can run, best last."""
    return tuple(s.name for s in _extension().usable_instruction_sets()) if available() else ()


def openmp_runtimes() -> tuple[str, ...]:
    """The OpenMP runtimes loaded in this process (Linux; elsewhere always empty)."""
    return _openmp_runtimes_with(len(sys.modules))


@functools.lru_cache(maxsize=1)
def _openmp_runtimes_with(modules: int) -> tuple[str, ...]:
    # Libraries arrive with imports, so the number of modules tells when to look again.
    try:
        mappings = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ()
    paths = {fields[5] for fields in (line.split(maxsplit=5) for line in mappings) if len(fields) == 6}
    return tuple(sorted(path for path in paths if _OPENMP_RUNTIME.match(Path(path).name)))


def threads() -> tuple[int, str]:
    """How many threads a kernel uses now, and why."""
    import torch

    if not (available() and _extension().openmp):
        return 1, "built without OpenMP"
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        # Each keeps a pool of its own: together they would oversubscribe the cores, or deadlock.
        return 1, f"several OpenMP runtimes in this process: {', '.join(runtimes)}"
    return torch.get_num_threads(), "torch.get_num_threads()"


def build_info() -> dict[str, Any]:
    """What is compiled, what of it is in use, and what was skipped and why.

    Works without the extension, and where torch is broken.

    Returns:
        native: available, reason (None or why not), path
        compiler: name and version, or None
        instruction_sets: compiled, usable, used (None or the one kernels take)
        openmp: built, runtimes (paths), threads, threads_reason
        cuda: built, architectures, reason
        skipped: {what: why}
    """
    extension, reason = _load()
    cuda = _build_record()["cuda"]
    try:
        count, count_reason = threads()
    except Exception as error:
        count, count_reason = 1, f"torch is broken: {error}"
    usable = instruction_sets()
    skipped = {} if extension else {"native": reason}
    if not cuda["built"]:
        skipped["cuda"] = cuda["reason"]
    return {
        "native": {
            "available": extension is not None,
            "reason": reason,
            "path": extension.__file__ if extension else None,
        },
        "compiler": extension.compiler if extension else None,
        "instruction_sets": {
            "compiled": [s.name for s in extension.compiled_instruction_sets()] if extension else [],
            "usable": list(usable),
            "used": usable[-1] if usable else None,
        },
        "openmp": {
            "built": bool(extension and extension.openmp),
            "runtimes": list(openmp_runtimes()),
            "threads": count,
            "threads_reason": count_reason,
        },
        "cuda": cuda,
        "skipped": skipped,
    }


@functools.cache
def _data_types() -> dict[Any, Any]:
    import torch

    names = ("float32", "float64", "float16", "bfloat16", "int32")
    return {getattr(torch, name): getattr(_extension().DataType, name) for name in names}


@functools.cache
def _floating_types() -> tuple[Any, ...]:
    return tuple(dtype for dtype in _data_types() if dtype.is_floating_point)


@functools.cache
def _instruction_set(name: str | None) -> Any:
    sets = {s.name: s for s in _extension().usable_instruction_sets()}
    if name is not None and name not in sets:
        raise ValueError(f"rank_one_update: instruction_set must be one of {', '.join(sets)} here, got {name}")
    return sets[name] if name is not None else list(sets.values())[-1]


def rank_one_update(
    base: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
    *,
    instruction_set: str | None = None,
) -> Tensor:  # [B, T, O]
    """Adds each row's updates to its base, on the CPU and without autograd.

    y[b, t] = base[b, t] + sum_r coefficients[b, t, r] * u[slots[b, r]]

    Sums in float32 (float64 where base is float64) and rounds once. A row's bits depend on that
    row alone, not on its neighbours and not on the number of threads.

    Args:
        base: [B, T, O] float32, float64, float16 or bfloat16; last dimension contiguous.
        u: [S, O], any of these types; last dimension contiguous.
        slots: [B, R] int32, the row of u each update takes; -1 is none, exactly; duplicates add.
        coefficients: [B, T, R], any of these types.
        instruction_set: one of `instruction_sets()`; by default the last.

    Returns:
        [B, T, O], contiguous, of base's type.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, layout or range.
        RuntimeError: the compiled kernels are not available.
    """
    import torch

    from .ops.checks import check_like

    extension = _extension()
    cpu = torch.device("cpu")
    floating = _floating_types()
    check_like("rank_one_update", "base", base, floating, ("B", "T", "O"), cpu)
    check_like("rank_one_update", "u", u, floating, ("S", base.shape[2]), cpu)
    check_like("rank_one_update", "slots", slots, (torch.int32,), (base.shape[0], "R"), cpu)
    check_like("rank_one_update", "coefficients", coefficients, floating, (*base.shape[:2], slots.shape[1]), cpu)
    for name, tensor in (("base", base), ("u", u)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            strides = list(tensor.stride())
            raise ValueError(f"rank_one_update: {name} must have a contiguous last dimension, got strides {strides}")
    if coefficients.dtype not in (torch.float32, torch.float64):
        coefficients = coefficients.float()  # the kernel reads no other; they are few

    y = torch.empty(base.shape, dtype=base.dtype)
    status = extension.rank_one_update(
        *(_describe(tensor) for tensor in (base, u, slots, coefficients, y)),
        instruction_set=_instruction_set(instruction_set),
        threads=threads()[0],
    )
    if status == extension.Status.slot_out_of_range:
        wrong = slots[(slots < -1) | (slots >= u.shape[0])][0]
        raise ValueError(f"rank_one_update: slots must lie in [-1, {u.shape[0]}), got {int(wrong)}")
    if status != extension.Status.ok:
        raise RuntimeError(f"rank_one_update: the kernel refused its arguments: {status.name}")
    return y


def _describe(tensor: Tensor) -> tuple[int, Any, tuple[int, ...], tuple[int, ...]]:
    """What csrc/bindings.cpp takes for a tensor, which must outlive the call."""
    return tensor.data_ptr(), _data_types()[tensor.dtype], tensor.shape, tensor.stride()
