"""What the machine has of what the other steps need."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

# Without these there are no CUDA kernels, or no tests; without the others only their own step fails.
NEEDED = ("make", "g++", "nvcc")
USEFUL = ("compute-sanitizer", "ncu", "nvidia-smi", "awk")
PACKAGES = ("pytest", "hypothesis", "pytest-benchmark", "pytest-xdist", "pybind11", "cmake", "ninja", "setuptools",
            "numpy", "torch", "triton", "diffusers")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stub", action="store_true", help="say what is missing, and do not fail for it")
    stub = parser.parse_args().stub
    missing = []
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    print(f"{header}: {'there' if header.exists() else 'missing'}")
    if not header.exists():
        missing.append("Python.h")
    for tool in (*NEEDED, *USEFUL):
        print(f"{tool}: {shutil.which(tool) or 'missing'}")
    missing += [tool for tool in NEEDED if shutil.which(tool) is None]
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} processors")
    for package in PACKAGES:
        try:
            print(f"{package}: {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package}: missing")
    if importlib.util.find_spec("pytest") is None:
        missing.append("pytest")
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        print(f"{found.name}, sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors")
        for name in ("L2_cache_size", "shared_memory_per_block_optin", "total_memory"):
            print(f"{name}: {getattr(found, name, 'not told')}")
    else:
        missing.append("a GPU")
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    print(f"missing: {', '.join(missing)}" if missing else "nothing that is needed is missing")
    return 1 if missing and not stub else 0


if __name__ == "__main__":
    sys.exit(main())
