"""Where the steps run: on a GPU, or on CPU tensors over a driver that launches nothing."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from keylock_kernels import native_cuda

Call = Callable[[dict[str, Any]], Any]  # of an input set


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stub", action="store_true", help="without a GPU: launches are checked, results are not")


def start(stub: bool) -> None:
    """Makes launching possible without a GPU, where that is asked for."""
    if stub:
        from tests.gpu_stub import driver

        driver.activate()


def backends() -> list[str]:
    """Of the backends for GPUs those that run here."""
    gpu = harness.DEVICE.type == "cuda" and native_cuda.missing() is None
    return ["triton", "cuda"] if gpu else ["triton"]


def input_sets(make: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Enough to fill the last cache twice; without a GPU one, since nothing is read."""
    return harness.make_sets(lambda seed: make()) if harness.DEVICE.type == "cuda" else [make()]


def seconds(call: Call, sets: list[dict[str, Any]], rounds: int = 15) -> float:
    """Median of a call's time: of the device, replayed from a graph; without a GPU of the host."""
    clock = harness.Clock(call, sets, graph=True)
    return statistics.median(clock.round() for _ in range(rounds)) / len(sets)


def copy_rate() -> float:
    """Bytes per second of a copy, read and written."""
    if harness.DEVICE.type != "cuda":
        return math.inf
    source = torch.empty(1 << 28, device=harness.DEVICE)
    into = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / seconds(lambda _: into.copy_(source), [{}])
