from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keylock_kernels import native_cuda
from tests.kernels import gpu_record
from tests.kernels.helpers import DEVICE, EXECUTED

ROOT = Path(__file__).resolve().parents[2]
torch.set_default_device(DEVICE)
_outcomes: dict[str, str] = {}


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out unfilled starts as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def own_cache() -> Iterator[None]:
    """Triton finds what it has compiled by its source, options and version, so it is kept from run to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
        patch.setitem(os.environ, "TRITON_DEFAULT_FP_FUSION", "1")
        yield


@pytest.fixture(scope="session", autouse=EXECUTED is not None)
def executed_ptx() -> Iterator[None]:
    """What a test launches is compiled for the GPU of `make test-ptx` and run by the machine of tests/ptx."""
    from tests.ptx.launches import simulated

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
        patch.setitem(os.environ, "TRITON_DEFAULT_FP_FUSION", "1")
        with simulated(str(EXECUTED)):
            yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """A test given the one backend that has no float64 is skipped where it asks for it."""
    try:
        return (yield)
    except ValueError as error:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") == "cuda" and "'cuda' cannot run" in str(error) and "not in float64" in str(error):
            pytest.skip(str(error))
        raise


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return  # of pytest-xdist: its controller is told every outcome, and one process writes them
    sources = native_cuda.sources()
    if DEVICE != "cpu" and sources is not None and _outcomes:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
        gpu_record.remember(_outcomes, architecture, sources)
