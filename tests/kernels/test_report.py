"""Without a GPU, what the Triton kernels compile to can still be read."""

from __future__ import annotations

import os

import pytest

from keylock_kernels import report
from keylock_kernels.backend import choose
from tests.kernels.helpers import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter and the compiler exclude each other")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(os.environ, "TRITON_DEFAULT_FP_FUSION", "1")


def test_a_prompts_layer_compiles_for_hopper_without_a_spill():
    case, call = next(iter(report.cases()))
    rows = report.compile_launches(call, "sm_90", case)
    kernels = {row.kernel for row in rows}
    assert {"linear_kernel", "products_kernel", "update_kernel", "table_part_kernel", "gate_part_kernel"} <= kernels
    assert [row.failures() for row in rows] == [[]] * len(rows)
    assert all(row.matrix > 0 and row.wide > 0 for row in rows if row.kernel == "linear_kernel")


def test_a_spill_is_a_failure():
    row = report.Compiled("case", "linear_kernel", "sm_90", 255, 8, 2, 1024, 4, 24, 10, 0)
    assert row.failures() == ["2 spills, 8 bytes of stack"]


def test_compiling_leaves_the_driver_as_it_was():
    from triton.runtime.driver import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError):
        report.compile_launches(lambda: 1 // 0, "sm_80", "case")
    assert driver._active is before


def test_triton_without_a_gpu_says_so():
    import torch

    with pytest.raises(ValueError, match="'triton' cannot run on cpu tensors: it runs on cuda tensors only"):
        choose("rank_one_linear", "triton", torch.device("cpu"), torch.float32)
