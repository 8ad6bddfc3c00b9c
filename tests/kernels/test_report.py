"""Without a GPU, what the Triton kernels compile to can still be read, and may not get worse."""

from __future__ import annotations

import dataclasses
import json

import pytest

from keylock_kernels import report
from keylock_kernels.backend import choose
from keylock_kernels.machine_code import TARGETS, Compiled, compile_launches
from tests.kernels.helpers import INTERPRETED

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter and the compiler exclude each other"),
    pytest.mark.usefixtures("own_cache"),
]
ROW = Compiled(
    "case", "localized_attention_fwd_kernel", "sm_90", 0, registers=128, stack=0, spills=0, shared=1024, warps=4,
    resident=16, matrix=24, unit="HGMMA", matrix_flops=1 << 20, exponentials=10, instructions=1000, wide=1.0, narrow=3,
)  # fmt: skip
CASE = report.Case("case", lambda: None, padding=1.2, allowed=1.25, moved=1 << 14)


QUICK = [case for case in report.cases() if case.quick]


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_kernels_pass_the_gates_and_are_no_worse_than_recorded(case, target):
    rows = compile_launches(case.call, target, case.name)
    assert {row.kernel: report.failures(row, case) for row in rows} == {row.kernel: [] for row in rows}
    assert report.compare(rows) == []


def test_the_record_has_every_case_on_every_target():
    recorded = {(row["case"], row["target"]) for row in json.loads(report.RECORD.read_text())["rows"]}
    assert recorded == {(case.name, target) for case in report.cases() for target in TARGETS}


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (dict(spills=2, stack=8), "2 spills, 8 bytes of stack"),
        (dict(stack=8), "0 spills, 8 bytes of stack"),
        (dict(shared=300 << 10), "307200 bytes of shared memory, 232448 allowed"),
        (dict(target="sm_80", shared=100 << 10), "102400 bytes of shared memory, 101376 allowed"),
        (dict(target="gfx942", shared=65 << 10), "66560 bytes of shared memory, 65536 allowed"),
        (dict(matrix=0), "no matrix unit"),
        (dict(wide=0.9), "90% of the bytes of queries, keys, values and outputs in 128-bit accesses"),
        (dict(resident=4, instructions=10**6), "4 resident warps"),
    ],
)
def test_what_a_kernel_must_not_do_is_a_failure(change, failure):
    assert report.failures(ROW, CASE) == []
    assert report.failures(dataclasses.replace(ROW, **change), CASE) == [failure]


def test_too_much_padding_is_a_failure():
    assert report.failures(ROW, dataclasses.replace(CASE, padding=1.3)) == [
        "1.30 times the useful products, 1.25 allowed"
    ]


def test_a_number_worse_than_recorded_is_noticed(tmp_path):
    path = tmp_path / "compiled.json"
    report.record([ROW], path)
    assert report.compare([ROW], path) == []
    assert report.compare([dataclasses.replace(ROW, registers=131)], path) == []
    (worse,) = report.compare([dataclasses.replace(ROW, registers=132)], path)
    assert worse.endswith("registers 128 -> 132")
    (worse,) = report.compare([dataclasses.replace(ROW, wide=0.9)], path)
    assert worse.endswith("wide 1.0 -> 0.9")
    report.record([dataclasses.replace(ROW, registers=64), dataclasses.replace(ROW, target="sm_80")], path)
    assert [row["registers"] for row in json.loads(path.read_text())["rows"]] == [128, 64]


def test_products_are_counted_from_the_code_as_the_plan_counts_them():
    """The text kernel's products on Hopper: 64 pixels by 80 keys by 64 channels, twice."""
    (case,) = [c for c in QUICK if c.name == "sdxl-4096x10x64 text bfloat16"]
    (row,) = [r for r in compile_launches(case.call, "sm_90", case.name) if "_fwd_" in r.kernel]
    assert row.matrix_flops == 2 * 2 * 64 * 80 * 64
    assert case.padding == pytest.approx(80 / 77)


def test_compiling_leaves_the_driver_as_it_was():
    from triton.runtime.driver import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError):
        compile_launches(lambda: 1 // 0, "sm_80", "case")
    assert driver._active is before


def test_triton_without_a_gpu_says_so():
    import torch

    with pytest.raises(ValueError, match="'triton' cannot run on cpu tensors: it runs on cuda tensors only"):
        choose("rank_one_linear", "triton", torch.device("cpu"), torch.float32)
