"""Builds keylock_kernels._native with CMake and Ninja, and records what was decided and why.

Needs neither torch nor a GPU nor the network. A build that fails is skipped, and says so, rather
than failing the installation: every op has an implementation in plain torch. Environment:

KEYLOCK_BUILD_NATIVE  1: an error instead of a skip; 0: do not build
KEYLOCK_BUILD_CUDA    1: an error instead of a skip; 0: do not build
CUDACXX               the nvcc to take instead of the one on PATH or in CUDA_HOME
CUDAARCHS             the architectures to compile for, as CMake writes them: 80-real;90-real;100
TORCH_CUDA_ARCH_LIST  the same as torch writes them: 8.0;9.0;10.0+PTX
MAX_JOBS              compile this many files at once; by default as many as there are processors,
                      and with nvcc no more than memory allows
"""

from __future__ import annotations

import importlib
import json
import os
import re
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
CUDA_ARCHITECTURES = "80-real;90-real;100"  # machine code for each, and PTX of the newest for later ones
NVCC_KIB = 2 << 20  # memory that one run of nvcc may take


class Decision(NamedTuple):
    built: bool
    reason: str


class BuildSkipped(Exception):
    """The native code cannot be built here; the message says why in one line."""


class Cuda(NamedTuple):
    """What CUDA code is compiled with, and for what."""

    nvcc: str
    architectures: str  # as CMake writes them


def cuda_wanted(environ: Mapping[str, str]) -> Cuda:
    if environ.get("KEYLOCK_BUILD_CUDA") == "0":
        raise BuildSkipped("KEYLOCK_BUILD_CUDA=0")
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    path = os.pathsep.join([environ.get("PATH", os.defpath), *(os.path.join(home, "bin") for home in homes)])
    nvcc = shutil.which(environ.get("CUDACXX") or "nvcc", path=path)
    if nvcc is None:
        raise BuildSkipped(f"{environ.get('CUDACXX') or 'nvcc'} is not installed")
    return Cuda(nvcc, cuda_architectures(environ))


def cuda_architectures(environ: Mapping[str, str]) -> str:
    if environ.get("CUDAARCHS"):
        return environ["CUDAARCHS"]
    listed = re.split(r"[;, ]+", environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if listed == [""]:
        return CUDA_ARCHITECTURES
    found = []
    for name in listed:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if match is None:
            raise BuildSkipped(f"TORCH_CUDA_ARCH_LIST names {name!r}; versions such as 9.0 or 9.0+PTX are understood")
        found.append(f"{match[1]}{match[2]}{match[3]}{'' if match[4] else '-real'}")
    return ";".join(found)


def architecture_names(architectures: str) -> list[str]:
    """What the module then holds: sm_90 is machine code, compute_90 is PTX, which later GPUs compile."""
    names = []
    for name in architectures.split(";"):
        number, _, kind = name.partition("-")
        names += [f"sm_{number}"] if kind != "virtual" else []
        names += [f"compute_{number}"] if kind != "real" else []
    return names


def decide(environ: Mapping[str, str], scratch: Path) -> tuple[Decision, Decision, list[str]]:
    """Builds the module inside `scratch`: what became of its CPU and its CUDA part, and for which GPUs."""
    wish = environ.get("KEYLOCK_BUILD_NATIVE")
    if wish == "0":
        native = Decision(False, "KEYLOCK_BUILD_NATIVE=0")
        return native, without_cuda(environ, native.reason), []
    architectures: list[str] = []
    try:
        try:
            wanted = cuda_wanted(environ)
            native = Decision(True, compile_native(environ, scratch, wanted))
            check_loads(scratch)
            architectures = architecture_names(wanted.architectures)
            cuda = Decision(True, f"{wanted.nvcc}; {' '.join(architectures)}")
        except BuildSkipped as skipped:
            cuda = without_cuda(environ, str(skipped))
            native = Decision(True, compile_native(environ, scratch, None))
    except BuildSkipped as skipped:
        if wish == "1":
            raise SetupError(f"KEYLOCK_BUILD_NATIVE=1, but {skipped}") from None
        native = Decision(False, str(skipped))
    return native, cuda, architectures


def without_cuda(environ: Mapping[str, str], reason: str) -> Decision:
    if environ.get("KEYLOCK_BUILD_CUDA") == "1":
        raise SetupError(f"KEYLOCK_BUILD_CUDA=1, but {reason}")
    return Decision(False, reason)


def summary(native: Decision, cuda: Decision) -> str:
    def say(decision: Decision) -> str:
        return f"{'yes' if decision.built else 'skipped'} ({decision.reason})"

    return f"keylock-kernels: native CPU kernels: {say(native)}; CUDA: {say(cuda)}"


def compile_native(environ: Mapping[str, str], scratch: Path, cuda: Cuda | None) -> str:
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
    tools = (*(environ.get(name) for name in ("CXX", "CXXFLAGS")), cuda and cuda.nvcc)
    chosen = json.dumps([configure, *tools])
    stamp = scratch / "chosen.json"
    if not stamp.exists() or stamp.read_text() != chosen:
        shutil.rmtree(scratch, ignore_errors=True)
    configure += [f"-DKEYLOCK_CUDA_ARCHITECTURES={cuda.architectures if cuda else ''}"]
    configure += [f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}"] if cuda else []
    run(configure, "CMake")
    stamp.write_text(chosen)
    jobs = environ.get("MAX_JOBS") or (cuda and str(jobs_for_memory()))
    run([cmake, "--build", str(scratch), *(["--parallel", jobs] if jobs else [])], "the compiler")
    return (scratch / "summary.txt").read_text()


def check_loads(scratch: Path) -> None:
    """No driver is needed for that, but everything of the CUDA runtime must have been linked."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _native"
    run([sys.executable, "-c", code, str(scratch)], "loading the module")


def jobs_for_memory() -> int:
    """As many as there are processors, and memory for a run of nvcc each."""
    jobs = os.cpu_count() or 1
    try:
        (available,) = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except (OSError, ValueError):
        return jobs
    return max(1, min(jobs, int(available) // NVCC_KIB))


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
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        # Not self.build_temp, which editable installs throw away: a second build compiles nothing.
        scratch = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        native, cuda, architectures = decide(os.environ, scratch)
        module.unlink(missing_ok=True)  # an earlier build's
        if native.built:
            shutil.copy2(scratch / module.name, module)
        record = {"native": native._asdict(), "cuda": {**cuda._asdict(), "architectures": architectures}}
        (module.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        print(summary(native, cuda), flush=True)

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
