"""Builds keylock_kernels._native with CMake and Ninja, and records what was decided and why.

Needs neither torch nor a GPU nor the network. A build that fails is skipped, and says so, rather
than failing the installation: every op has an implementation in plain torch. Environment:

KEYLOCK_BUILD_NATIVE  1: an error instead of a skip; 0: do not build
KEYLOCK_BUILD_CUDA    1: an error instead of a skip; 0: do not build
MAX_JOBS              compile this many files at once
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
RECORD = "_build.json"  # beside the module; keylock_kernels/native.py reads it


class Decision(NamedTuple):
    built: bool
    reason: str


class BuildSkipped(Exception):
    """The native code cannot be built here; the message says why in one line."""


def cuda_decision(environ: Mapping[str, str]) -> Decision:
    reason = "this version contains no CUDA kernels"
    if environ.get("KEYLOCK_BUILD_CUDA") == "1":
        raise SetupError(f"KEYLOCK_BUILD_CUDA=1, but {reason}")
    return Decision(False, "KEYLOCK_BUILD_CUDA=0" if environ.get("KEYLOCK_BUILD_CUDA") == "0" else reason)


def native_decision(environ: Mapping[str, str], scratch: Path) -> Decision:
    """Builds the module inside `scratch`, unless the environment forbids it or it cannot be built."""
    wish = environ.get("KEYLOCK_BUILD_NATIVE")
    if wish == "0":
        return Decision(False, "KEYLOCK_BUILD_NATIVE=0")
    try:
        return Decision(True, compile_native(environ, scratch))
    except BuildSkipped as skipped:
        if wish == "1":
            raise SetupError(f"KEYLOCK_BUILD_NATIVE=1, but {skipped}") from None
        return Decision(False, str(skipped))


def summary(native: Decision, cuda: Decision) -> str:
    def say(decision: Decision) -> str:
        return f"{'yes' if decision.built else 'skipped'} ({decision.reason})"

    return f"keylock-kernels: native CPU kernels: {say(native)}; CUDA: {say(cuda)}"


def compile_native(environ: Mapping[str, str], scratch: Path) -> str:
    """Returns the compiler, the instruction sets and OpenMP's version, as CMake reports them."""
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    ninja = find_tool("ninja", "BIN_DIR")
    try:
        import pybind11
    except ImportError:
        raise BuildSkipped("pybind11 is not installed") from None
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(scratch)]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    # CMake keeps the tools it once found; start over where others are asked for.
    chosen = json.dumps([configure, *(environ.get(name) for name in ("CXX", "CXXFLAGS"))])
    stamp = scratch / "chosen.json"
    if not stamp.exists() or stamp.read_text() != chosen:
        shutil.rmtree(scratch, ignore_errors=True)
    run(configure, "CMake")
    stamp.write_text(chosen)
    jobs = ["--parallel", environ["MAX_JOBS"]] if environ.get("MAX_JOBS") else []
    run([cmake, "--build", str(scratch), *jobs], "the compiler")
    return (scratch / "summary.txt").read_text()


def find_tool(name: str, directory: str) -> str:
    """The tool of the Python package of that name, which need not be on PATH, or the system's."""
    try:
        path = shutil.which(name, path=getattr(importlib.import_module(name), directory, None))
    except ImportError:
        path = None
    path = path or shutil.which(name)
    if path is None:
        raise BuildSkipped(f"{name} is not installed")
    return path


def run(command: list[str], what: str) -> None:
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        print(result.stdout, file=sys.stderr)
        raise BuildSkipped(f"{what} failed: {first_error(result.stdout)}")


def first_error(log: str) -> str:
    """One line of the log; with CMake's the message, not the place it came from."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if "error" in line.lower()), None)
    if start is None:
        return lines[-1] if lines else "no output"
    end = start + 1
    while end < len(lines) and lines[end - 1].endswith(":"):
        end += 1
    if lines[start].startswith("CMake Error at") and end > start + 1:
        start += 1
    return " ".join(lines[start:end])


class BuildNative(build_ext):
    def run(self) -> None:
        self.cuda = cuda_decision(os.environ)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        # Not self.build_temp, which editable installs throw away: a second build compiles nothing.
        scratch = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        native = native_decision(os.environ, scratch)
        module.unlink(missing_ok=True)  # an earlier build's
        if native.built:
            shutil.copy2(scratch / module.name, module)
        record = {"native": native._asdict(), "cuda": {**self.cuda._asdict(), "architectures": []}}
        (module.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        print(summary(native, self.cuda), flush=True)

    def copy_extensions_to_source(self) -> None:
        """Editable installs run from the checkout, so that is where the results must be."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            package = ROOT / Path(*ext.name.split(".")[:-1])
            (package / built.name).unlink(missing_ok=True)
            for file in (built, built.with_name(RECORD)):
                if file.exists():
                    shutil.copy2(file, package)


if __name__ == "__main__":
    setup(
        packages=find_packages(include=["keylock_kernels*"]) + find_packages("python", include=["keylock_diffusers*"]),
        package_dir={"keylock_diffusers": "python/keylock_diffusers"},
        ext_modules=[Extension("keylock_kernels._native", sources=[])],  # CMake knows the sources
        cmdclass={"build_ext": BuildNative},
    )
