"""The choice of a backend is explicit, explained, and needs nothing that is not there."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import keylock_kernels
from keylock_kernels import backend, explain, localized_attention, native, native_cuda, rank_one_update
from keylock_kernels.testing import attention_inputs
from tests.kernels import conftest, gpu_record

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
    assert backend.choose("rank_one_linear", "auto", CPU, torch.float32) == "bmm"
    assert backend.choose("rank_one_linear", "auto", CPU, torch.float64) == "eager"
    assert "rank_one_linear on cpu: bmm" in explain()
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


def test_auto_takes_sdpa_where_the_native_kernel_is_missing_or_only_portable(without_native, monkeypatch):
    assert backend.choose("localized_attention", "auto", CPU, torch.float32) == "sdpa"
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "instruction_sets", lambda: ("portable",))
    assert backend.choose("localized_attention", "auto", CPU, torch.float32) == "sdpa"
    assert "auto passes it over: only its portable code runs on this CPU" in explain()
    monkeypatch.setattr(native, "instruction_sets", lambda: ("portable", "avx2"))
    assert backend.choose("localized_attention", "auto", CPU, torch.float32) == "native"


def test_auto_takes_triton_on_a_gpu_but_for_float64(monkeypatch):
    cuda = torch.device("cuda")
    for op, second in (
        ("rank_one_linear", "bmm"),
        ("low_rank_linear", "bmm"),
        ("rank_one_update", "eager"),
        ("localized_attention", "sdpa"),
    ):
        assert backend.choose(op, "auto", cuda, torch.bfloat16) == "triton"
        assert backend.choose(op, "auto", cuda, torch.float64) == "eager"
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "triton", None)
            assert backend.choose(op, "auto", cuda, torch.bfloat16) == second
    assert "no run on a GPU is on record yet" in explain()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """CUDA kernels on an sm_90, and no Triton; `record` is what is on record about them."""

    def record(passed):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(native_cuda, "missing", lambda: None)
        monkeypatch.setattr(native_cuda, "sources", lambda: "these sources")
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setattr(backend, "_recorded_architectures", backend._recorded_architectures.__wrapped__)
        monkeypatch.setattr(backend, "_GPU_RECORD", passed)

    return record


OPS_AND_OTHERS = (
    ("rank_one_linear", "bmm"),
    ("low_rank_linear", "bmm"),
    ("rank_one_update", "eager"),
    ("localized_attention", "sdpa"),
)


@pytest.mark.parametrize(
    ("record", "is_taken"),
    [
        (None, False),
        ({"sm_90": {"sources": "these sources"}}, True),
        ({"sm_90": {"sources": "other sources"}}, False),
        ({"sm_80": {"sources": "these sources"}}, False),
    ],
)
def test_auto_takes_cuda_only_where_its_tests_are_on_record(on_a_gpu, tmp_path, record, is_taken):
    path = tmp_path / "record.json"
    if record is not None:
        path.write_text(json.dumps(record))
    on_a_gpu(path)
    for op, other in OPS_AND_OTHERS:
        assert backend.choose(op, "auto", torch.device("cuda"), torch.bfloat16) == ("cuda" if is_taken else other)
        assert backend.choose(op, "auto", torch.device("cuda"), torch.float64) == "eager"
        assert backend.choose(op, "cuda", torch.device("cuda"), torch.bfloat16) == "cuda"
    text = "auto passes it over: no passing GPU test record for sm_90 is on record"
    assert (text in explain()) is not is_taken


def test_no_record_is_there_without_the_tests_having_passed():
    if not backend._GPU_RECORD.exists():
        assert "no passing GPU test record for any GPU is on record" in explain() or torch.cuda.is_available()


def test_cuda_refuses_what_it_cannot_do(on_a_gpu, tmp_path):
    on_a_gpu(tmp_path / "none.json")
    for op, _ in OPS_AND_OTHERS:
        with pytest.raises(ValueError, match="'cuda' cannot run on cpu tensors: it runs on cuda tensors only"):
            backend.choose(op, "cuda", CPU, torch.float32)
        with pytest.raises(ValueError, match="'cuda' cannot run on cuda tensors: .* float32 only, not in float64"):
            backend.choose(op, "cuda", torch.device("cuda"), torch.float64)


def test_gradients_of_cuda_are_tritons(monkeypatch):
    """Whatever ran forward, the backward asks Triton's launcher."""
    from keylock_kernels.ops.localized_attention import op as attention
    from keylock_kernels.ops.low_rank import op as low_rank

    called = []

    def launcher(name, found):
        return lambda *arguments, **options: called.append(name) or found

    attention_triton = types.SimpleNamespace(backward=launcher("attention", []))
    low_rank_triton = types.SimpleNamespace(
        linear_backward=launcher("linear", {}), update_backward=launcher("update", {})
    )
    for module, launchers in ((attention, attention_triton), (low_rank, low_rank_triton)):
        package = module.__name__.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, f"{package}.triton", launchers)
        monkeypatch.setattr(sys.modules[package], "triton", launchers, raising=False)
    x = torch.ones(1, 2, 3)
    slots = torch.zeros(1, 1, dtype=torch.int32)
    attention._backward(None, None, x, x, x, 1.0, *[None] * 5, [], *[None] * 4, "cuda", [False] * 9)
    updates = (x[0], None, None, slots, *[None] * 4, x[..., :1], 1)
    low_rank._linear_backward(x, x, x[0], None, None, *updates, "cuda", [False] * 13)
    low_rank._update_backward(x, None, *updates, "cuda", [False] * 10)
    assert called == ["attention", "linear", "update"]


def test_explain_names_every_op_and_every_backend():
    text = explain()
    for op in keylock_kernels.__all__:
        if op in ("__version__", "explain", "rank_one_coefficients"):
            continue
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


@pytest.mark.parametrize(
    "module", ["backend", "ops.low_rank.low_rank", "ops.low_rank.rank_one", "ops.localized_attention.api"]
)
def test_the_docstrings_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"keylock_kernels.{module}"))
    assert results.attempted > 0 and results.failed == 0


def test_a_record_needs_every_test_to_have_passed(tmp_path):
    here, there = tmp_path / "outcomes.json", tmp_path / "record.json"
    collected = ["a.py::test_x[cuda-1]", "a.py::test_x[triton-1]", "a.py::test_y[cuda]", "2 tests collected"]
    gpu_record.remember({"a.py::test_x[cuda-1]": "passed", "a.py::test_x[triton-1]": "failed"}, "sm_90", "s", here)
    with pytest.raises(ValueError, match=r"1 of 2 tests have not passed: a.py::test_y\[cuda\]"):
        gpu_record.put_on_record(json.loads(here.read_text()), collected, there)
    gpu_record.remember({"a.py::test_y[cuda]": "skipped"}, "sm_90", "s", here)
    gpu_record.put_on_record(json.loads(here.read_text()), collected, there)
    record = json.loads(there.read_text())
    assert record["sm_90"]["sources"] == "s" and record["sm_90"]["passed"] == 1
    gpu_record.remember({"a.py::test_y[cuda]": "passed"}, "sm_90", "changed sources", here)
    with pytest.raises(ValueError, match="1 of 2 tests have not passed"):
        gpu_record.put_on_record(json.loads(here.read_text()), collected, there)
    assert json.loads(there.read_text()) == record


def test_of_several_worker_processes_only_the_controller_notes_outcomes(monkeypatch):
    noted = []
    monkeypatch.setattr(conftest, "DEVICE", "cuda")
    monkeypatch.setattr(conftest, "_outcomes", {"a.py::test_x[cuda]": "passed"})
    monkeypatch.setattr(native_cuda, "sources", lambda: "s")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_record, "remember", lambda *arguments: noted.append(arguments))
    conftest.pytest_sessionfinish(types.SimpleNamespace(config=types.SimpleNamespace(workerinput={})))
    assert not noted
    conftest.pytest_sessionfinish(types.SimpleNamespace(config=types.SimpleNamespace()))
    assert noted == [({"a.py::test_x[cuda]": "passed"}, "sm_90", "s")]
