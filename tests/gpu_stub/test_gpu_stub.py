"""Without a GPU: kernels go through Triton's compiler and launcher, over a driver that launches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
if not sys.platform.startswith("linux"):
    pytest.skip("the driver's stand-in is an ELF library", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


def run_module(*arguments: str) -> str:
    """What a module prints, run in a process of its own: the stand-in stays for good."""
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    environ |= {"TRITON_DEFAULT_FP_FUSION": "1"}
    environ.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_captured_step_meets_no_new_kernel_and_another_is_refused():
    text = run_module("tests.gpu_stub.capture")
    assert "all of them loaded before the capture" in text and "ok, once it has been called" in text


def test_the_first_run_on_a_gpu_can_be_rehearsed(tmp_path):
    """Its smoke step, in one dtype and two of its cases."""
    found = run_module("benchmarks.first_gpu.smoke", "--stub", "--dtypes", "bfloat16", "--cases", "text", "update")
    assert "ok text, bfloat16, triton" in found and "2 calls, 0 fail" in found
    text = run_module("benchmarks.first_gpu", "--stub", "--results", str(tmp_path), "probe", "host", "memcheck")
    table = {line.split()[0]: line.split()[1] for line in text.splitlines()[-6:] if line}
    assert (table["probe"], table["memcheck"], table["host"]) == ("ok", "skipped", "ok"), text


def test_a_launch_that_a_gpu_refuses_is_refused():
    code = (
        "import torch; from keylock_kernels import rank_one_update; from tests.gpu_stub import driver\n"
        "stub = driver.activate(); rows = 65536\n"
        "base, slots = torch.zeros(1, 1, 1).expand(rows, 1, 1), torch.zeros(1, 1, dtype=torch.int32).expand(rows, 1)\n"
        "try: rank_one_update(base, base[0], slots, base, backend='triton')\n"
        "except RuntimeError as error: print(error, stub.counts.refused)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, text=True, capture_output=True)
    assert done.stdout.strip().endswith(" 1"), done.stdout + done.stderr
