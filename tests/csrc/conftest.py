from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    """The CUDA kernels compiled for the host, from the sources as they are now."""
    setup_py = load("keylock_setup", ROOT / "setup.py")
    pybind11 = pytest.importorskip("pybind11")
    try:
        cmake, ninja = setup_py.find_tool("cmake", "CMAKE_BIN_DIR"), setup_py.find_tool("ninja", "BIN_DIR")
    except setup_py.BuildSkipped as skipped:
        pytest.skip(str(skipped))
    scratch = ROOT / "build" / f"emulation-{sys.implementation.cache_tag}"
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(scratch)]
    scratch.mkdir(parents=True, exist_ok=True)
    with open(scratch / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that run tests, one builds
        for command in (
            [*configure, *(f"-D{name}={value}" for name, value in options.items())],
            [cmake, "--build", str(scratch), "--target", "_cuda_emulation"],
        ):
            result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert result.returncode == 0, result.stdout
    (path,) = (scratch / "csrc" / "cuda").glob("_cuda_emulation*.so")
    return load("_cuda_emulation", path)
