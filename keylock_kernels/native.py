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


def extension() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"native kernels are not available: {reason}")
    return module


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets the kernels are compiled for and this machine can run, best last."""
    return tuple(s.name for s in extension().usable_instruction_sets()) if available() else ()


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

    if not (available() and extension().openmp):
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
    module, reason = _load()
    cuda = _build_record()["cuda"]
    try:
        count, count_reason = threads()
    except Exception as error:
        count, count_reason = 1, f"torch is broken: {error}"
    usable = instruction_sets()
    skipped = {} if module else {"native": reason}
    if not cuda["built"]:
        skipped["cuda"] = cuda["reason"]
    return {
        "native": {
            "available": module is not None,
            "reason": reason,
            "path": module.__file__ if module else None,
        },
        "compiler": module.compiler if module else None,
        "instruction_sets": {
            "compiled": [s.name for s in module.compiled_instruction_sets()] if module else [],
            "usable": list(usable),
            "used": usable[-1] if usable else None,
        },
        "openmp": {
            "built": bool(module and module.openmp),
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
    return {getattr(torch, name): getattr(extension().DataType, name) for name in names}


@functools.cache
def floating_types() -> tuple[Any, ...]:
    """The dtypes that kernels read."""
    return tuple(dtype for dtype in _data_types() if dtype.is_floating_point)


@functools.cache
def instruction_set(op: str, name: str | None) -> Any:
    """The one of that name, or the best this machine can run."""
    sets = {s.name: s for s in extension().usable_instruction_sets()}
    if name is not None and name not in sets:
        raise ValueError(f"{op}: instruction_set must be one of {', '.join(sets)} here, got {name}")
    return sets[name] if name is not None else list(sets.values())[-1]


def describe(tensor: Tensor) -> tuple[int, Any, tuple[int, ...], tuple[int, ...]]:
    """What csrc/bindings.cpp takes for a tensor, which must outlive the call."""
    return tensor.data_ptr(), _data_types()[tensor.dtype], tensor.shape, tensor.stride()


def describe_optional(tensor: Tensor | None) -> tuple[int, Any, tuple[int, ...], tuple[int, ...]] | None:
    return None if tensor is None else describe(tensor)


def require_cpu(op: str, *tensors: Tensor) -> None:
    """ValueError unless the kernels can read these; what else they need they check themselves."""
    for tensor in tensors:
        if not tensor.is_cpu:
            raise ValueError(f"{op}: the native kernels read CPU tensors, got one on {tensor.device}")


def raise_for(op: str, status: Any) -> None:
    """MemoryError or RuntimeError unless a kernel says that all is well."""
    if status.name == "out_of_memory":
        raise MemoryError(f"{op}: no memory for the kernel's scratch")
    if status.name != "ok":
        raise RuntimeError(f"{op}: the kernel refused its arguments: {status.name}")
