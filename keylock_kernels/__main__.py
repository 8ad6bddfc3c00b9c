"""``python -m keylock_kernels``: which backend each op takes here, and what there is to choose from."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from typing import Any


def _packages(name: str) -> Callable[[], str]:
    def version() -> str:
        from importlib.metadata import version as installed

        return installed(name)

    return version


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none (torch built for {torch.version.cuda or 'CPU only'})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _native() -> str:
    from . import native

    state = "available" if native.available() else f"not available: {native.unavailable_reason()}"
    return "\n  ".join([state, *_flat(native.build_info())])


def _flat(facts: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            lines.append(f"{prefix}{key}: {text or 'none'}")
    return lines


def _own_version() -> str:
    from ._version import __version__

    return __version__


def _explain() -> str:
    from .backend import explain

    return "\n" + explain()


PROBES: tuple[tuple[str, Callable[[], str]], ...] = (
    ("keylock_kernels", _own_version),
    ("python", lambda: f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"),
    ("platform", platform.platform),
    ("processor", lambda: f"{platform.machine()}, {os.cpu_count()} cores"),
    ("torch", _torch),
    ("triton", _packages("triton")),
    ("cuda", _cuda),
    ("native", _native),
    ("backends", _explain),
)


def report() -> str:
    """The report; a probe that fails says how, and the others still speak."""
    lines = []
    for name, probe in PROBES:
        try:
            text = probe()
        except Exception as error:  # a broken environment is what this report is for
            text = f"unavailable ({type(error).__name__}: {error})"
        lines.append(f"{name}: {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
