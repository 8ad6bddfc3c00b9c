"""The library's own launches of Triton kernels, compiled for a GPU and run by the machine instead."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from keylock_kernels import backend
from keylock_kernels.machine_code import launches_seen
from keylock_kernels.ops.launching import Observer

from .machine import Kernel, Machine

Edit = Callable[[str, str], str]  # the name and the PTX of a kernel -> the PTX to run
_TERMS = {"sm_80": 8, "sm_90": 16}  # of a product that its tensor cores add up at a time
_kernels: dict[str, Kernel] = {}  # by PTX: Triton gives the same text for the same kernel


def _ptx_alone(pipeline: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook into its pipeline: no machine code is made. Called with nothing, it says what it is to a cache."""
    if stages is None:
        return "without machine code", "1"
    stages["cubin"] = lambda source, metadata: b""
    return None


def _flat(signature: Any, argument: Any) -> Iterator[Any]:
    """The arguments that the compiled kernel takes, out of their tuples."""
    if isinstance(signature, tuple):
        for part, value in zip(signature, argument, strict=True):
            yield from _flat(part, value)
    elif signature != "constexpr":
        yield float(argument) if signature.startswith("fp") else argument


def arguments(compiled: Any, kernel: Any, args: Iterable[Any], options: dict[str, Any]) -> list[Any]:
    """What a launch gives the compiled kernel, in the order of its parameters."""
    named = dict(zip(kernel.arg_names, args, strict=False)) | options
    return [value for name, kind in compiled.src.signature.items() for value in _flat(kind, named[name])]


@contextlib.contextmanager
def gpu(target: str, observer: Observer, processors: int = 132) -> Iterator[None]:
    """Inside the block, ops take CPU tensors with backend "triton"; the observer is shown what they launch.

    Args:
        target: the architecture that Triton compiles for, without making machine code.
        observer: as of `launching.observed`.
        processors: how many multiprocessors launchers are told of: with few, a program takes several tiles in turn.
    """
    from triton import knobs

    everywhere = tuple(
        dataclasses.replace(entry, devices=("cuda", "cpu")) if entry.backend == "triton" else entry
        for entry in backend.IMPLEMENTATIONS
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "IMPLEMENTATIONS", everywhere))
        stack.enter_context(mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _ptx_alone))
        for name, module in list(sys.modules.items()):
            if name.startswith("keylock_kernels.ops.") and hasattr(module, "processors"):
                stack.enter_context(mock.patch.object(module, "processors", lambda device: processors))
        stack.enter_context(launches_seen(observer, target))
        yield


@contextlib.contextmanager
def simulated(
    target: str, order: str = "together", edit: Edit | None = None, processors: int = 132, exact: bool = True
) -> Iterator[None]:
    """As `gpu`; what is launched runs on the machine.

    Args:
        order: in which the warps of a block run, of machine.ORDERS.
        edit: what becomes of a kernel's PTX before it runs.
        exact: whether products are summed exactly, instead of as the target's tensor cores do.
    """

    def launched(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        compiled = kernel.warmup(*args, grid=grid, **options)
        text = compiled.asm["ptx"]
        if edit is not None:
            text = edit(kernel.fn.__name__, text)
        if text not in _kernels:
            _kernels[text] = Kernel(text)
        given = arguments(compiled, kernel, args, options)
        metadata, terms = compiled.metadata, None if exact else _TERMS[target]
        Machine(_kernels[text], grid, metadata.num_warps, metadata.shared, given, order, terms).run()
        return True

    with _poisoned(), gpu(target, launched, processors):
        yield


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that torch hands out unfilled is NaN: an element that no kernel writes shows."""
    outer = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(outer)
