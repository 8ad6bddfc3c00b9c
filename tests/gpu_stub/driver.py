"""Puts a driver that launches nothing under Triton, whose own compiler and launcher then run; for a whole process.

The ops take CPU tensors with backend "triton", compile for sm_90 and launch; what they return is unfilled memory. That
no launch is refused, and that none loads a kernel in a capture, is what can be learned without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("libcuda_stub.c")
ARCHITECTURE = 90
DEVICE = 64  # Triton keeps kernels by device; the report's targets have the first numbers


class Counts(ctypes.Structure):
    """As in libcuda_stub.c."""

    _fields_ = [(name, ctypes.c_long) for name in ("launched", "refused", "loaded", "largest_shared")]


class Stub:
    """The library that stands in for the driver."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.counts = Counts.in_dll(library, "stub_counts")
        self._capturing = ctypes.c_int.in_dll(library, "stub_capturing")

    @property
    def capturing(self) -> bool:
        return bool(self._capturing.value)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Inside the block nothing can be loaded, as while a CUDA graph is captured."""
        self._capturing.value = 1
        try:
            yield
        finally:
            self._capturing.value = 0


def build(folder: Path = ROOT / "build" / "gpu-stub") -> Path:
    """Compiles the library against the headers that Triton brings."""
    import triton

    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("no C compiler is installed, which Triton needs as well")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may have the library open
        made = Path(scratch) / library.name
        options = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", f"-I{include}"]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(made)], check=True)
        made.replace(library)
    return library


def activate() -> Stub:
    """Makes Triton take the library for the driver, and the ops take CPU tensors for a GPU's."""
    library = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    # Loaded under the name that Triton's modules look for, which then need no search path.
    stub = Stub(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    from keylock_kernels import backend
    from keylock_kernels.ops import launching

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: DEVICE
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=DEVICE: 0
            self.get_device_capability = lambda device=DEVICE: divmod(ARCHITECTURE, 10)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", ARCHITECTURE, 32)

    driver.set_active(Driver())
    backend.IMPLEMENTATIONS = tuple(
        replace(entry, devices=("cuda", "cpu")) if entry.backend == "triton" else entry
        for entry in backend.IMPLEMENTATIONS
    )
    launching._assumed = f"sm_{ARCHITECTURE}"
    launching.capturing = lambda device: stub.capturing
    return stub
