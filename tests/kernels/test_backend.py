"""The choice of a backend is explicit, explained, and needs nothing that is not there."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import keylock_kernels
from keylock_kernels import backend, explain, localized_attention, native, rank_one_update
from keylock_kernels.testing import attention_inputs

CPU = torch.device("cpu")
ROOT = Path(keylock_kernels.__file__).parent.parent


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_auto_takes_native_on_the_cpu():
    assert backend.choose("rank_one_update", "auto", CPU, torch.float32) == "native"


def test_auto_falls_back_and_says_why(without_native):
    assert backend.choose("rank_one_linear", "auto", CPU, torch.float32) == "eager"
    assert "rank_one_linear on cpu: eager" in explain()
    assert "not available: no compiler was found" in explain()


def test_an_explicit_backend_that_cannot_run_raises(without_native):
    x, slots = torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="'native' cannot run on cpu tensors: no compiler was found"):
        rank_one_update(x, x[0], slots, torch.ones(1, 1, 1), backend="native")
    with pytest.raises(ValueError, match="'native' cannot run on cuda tensors: it runs on cpu tensors only"):
        backend.choose("rank_one_update", "native", torch.device("cuda"), torch.float32)


def test_auto_takes_native_but_for_float64():
    for dtype, expected in ((torch.float32, "native"), (torch.bfloat16, "native"), (torch.float64, "eager")):
        assert backend.choose("localized_attention", "auto", CPU, dtype) == expected
        inputs = attention_inputs(1, 64, 77, 2, 16, dtype=dtype)
        assert torch.equal(localized_attention(**inputs), localized_attention(**inputs, backend=expected))


def test_auto_takes_triton_on_a_gpu_but_for_float64(monkeypatch):
    cuda = torch.device("cuda")
    for op, second in (("rank_one_linear", "eager"), ("rank_one_update", "eager"), ("localized_attention", "sdpa")):
        assert backend.choose(op, "auto", cuda, torch.bfloat16) == "triton"
        assert backend.choose(op, "auto", cuda, torch.float64) == "eager"
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "triton", None)
            assert backend.choose(op, "auto", cuda, torch.bfloat16) == second
    assert "no run on a GPU is on record yet" in explain()


def test_explain_names_every_op_and_every_backend():
    text = explain()
    for op in ("rank_one_linear", "rank_one_update", "localized_attention"):
        assert f"{op} on cpu: " in text
    for name in backend.BACKENDS[1:]:
        assert name in text


def test_importing_the_package_imports_no_torch():
    result = run_python("import sys, keylock_kernels; print('torch' in sys.modules, keylock_kernels.__version__)")
    assert result.stdout.split() == ["False", keylock_kernels.__version__], result.stderr


def test_the_ops_import_neither_diffusers_nor_the_pipelines_package():
    blocked = "('diffusers', 'transformers', 'keylock_diffusers', 'triton', 'peft')"
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import keylock_kernels as k, keylock_kernels.testing as t, torch\n"
        "k.rank_one_linear(**t.rank_one_inputs(1, 2, 3, 4, 2, 1)); k.explain()\n"
        "k.localized_attention(**t.attention_inputs(1, 2, 3, 1, 2)); print('fine')"
    )
    result = run_python(code)
    assert result.stdout == "fine\n", result.stderr


def test_the_report_prints_where_torch_is_broken():
    code = "import sys, runpy\nsys.modules['torch'] = None\nrunpy.run_module('keylock_kernels', run_name='__main__')"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "torch: unavailable (" in result.stdout
    for probe in ("keylock_kernels: ", "python: ", "platform: ", "triton: ", "native: ", "backends: unavailable ("):
        assert probe in result.stdout


def test_the_report_holds_explain():
    from keylock_kernels.__main__ import report

    assert explain() in report()


def test_every_public_name_resolves_and_no_other_does():
    for name in keylock_kernels.__all__:
        assert getattr(keylock_kernels, name) is not None
    assert set(keylock_kernels.__all__) <= set(dir(keylock_kernels))
    with pytest.raises(AttributeError, match="no attribute 'fused'"):
        keylock_kernels.fused  # noqa: B018


@pytest.mark.parametrize("module", ["backend", "ops.rank_one.api", "ops.localized_attention.api"])
def test_the_docstrings_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"keylock_kernels.{module}"))
    assert results.attempted > 0 and results.failed == 0
