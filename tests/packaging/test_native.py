"""What the compiled extension is, where it comes from, and what it must not depend on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from keylock_kernels import native, native_cuda

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(not native.available(), reason=f"native: {native.unavailable_reason()}")

# Import machinery that refuses some names as if they were not installed, then the code under test.
BLOCKING = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r} or name in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
{code}
"""


def run_blocked(*blocked: str, code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", BLOCKING.format(blocked=blocked, code=code)],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_keylock_kernels_needs_no_diffusers():
    run_blocked(
        "diffusers",
        "transformers",
        "keylock_diffusers",
        code="import keylock_kernels\nfor name in keylock_kernels.__all__: getattr(keylock_kernels, name)",
    )


def test_importing_native_does_not_import_torch():
    assert "False" in run_blocked(code="import keylock_kernels.native; print('torch' in sys.modules)")


REPORT = "import json; from keylock_kernels import native; print(json.dumps(native.build_info()))"


def test_without_the_extension_everything_reports_and_ops_raise():
    code = f"""
{REPORT}
print(json.dumps([native.available(), native.unavailable_reason()]))
import torch
try:
    from keylock_kernels.ops.low_rank import native as low_rank
    low_rank.low_rank_update(torch.zeros(1, 1, 1), None, None)
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    info, (available, reason), error = map(json.loads, run_blocked("keylock_kernels._native", code=code).splitlines())
    assert not available and reason
    assert info["native"] == {"available": False, "reason": reason, "path": None}
    assert info["skipped"]["native"] == reason
    assert info["instruction_sets"] == {"compiled": [], "usable": [], "used": None}
    assert info["openmp"]["threads"] == 1
    assert error == f"native kernels are not available: {reason}"


def test_reason_is_the_one_the_build_recorded(tmp_path, monkeypatch):
    record = tmp_path / "_build.json"
    monkeypatch.setattr(native, "_RECORD", record)
    assert "not built" in native._build_record()["native"]["reason"]
    reason = {"built": False, "reason": "the compiler failed: out of luck"}
    record.write_text(json.dumps({"native": reason, "cuda": {**reason, "architectures": []}}))
    assert native._build_record()["native"]["reason"] == "the compiler failed: out of luck"


def test_build_info_where_torch_is_broken():
    info = json.loads(run_blocked("torch", code=REPORT))
    assert info["openmp"]["threads"] == 1
    if native.available():
        assert info["native"]["available"]
        assert "torch is broken" in info["openmp"]["threads_reason"]


def test_cuda_is_reported_as_it_was_built():
    info = native.build_info()
    assert info["cuda"]["reason"]
    if info["cuda"]["built"]:
        assert info["cuda"]["architectures"] and "cuda" not in info["skipped"]
        assert native_cuda.missing() is None and native_cuda.sources()
    else:
        assert info["cuda"]["architectures"] == []
        assert info["skipped"]["cuda"] == native_cuda.missing() == info["cuda"]["reason"]
        assert native_cuda.sources() is None


@pytest.mark.skipif(native_cuda.missing() is not None, reason=f"CUDA: {native_cuda.missing()}")
def test_without_a_driver_a_launch_is_refused(monkeypatch):
    import torch

    from keylock_kernels.ops.low_rank.updates import Updates

    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    monkeypatch.setattr(native_cuda, "_DEVICE", "cpu")
    monkeypatch.setattr(native_cuda, "_stream", lambda device: 0)
    x, slots = torch.ones(1, 4, 8), torch.zeros(1, 1, dtype=torch.int32)
    updates = Updates(x[0], None, None, slots, None, None, None, None, x[..., :1], 1)
    for call in (
        lambda: native_cuda.low_rank_update(x, None, updates),
        lambda: native_cuda.low_rank_linear(x, torch.ones(8, 8), None, None, updates),
        lambda: native_cuda.localized_attention(*[x[:, :, None]] * 3, 1.0, *[None] * 5, [], *[None] * 4),
    ):
        with pytest.raises(RuntimeError, match="the CUDA kernel was not launched: launch_failed"):
            call()


@needs_native
def test_build_info_with_the_extension():
    info = native.build_info()
    assert info["native"]["reason"] is None and Path(info["native"]["path"]).exists()
    assert info["compiler"]
    sets = info["instruction_sets"]
    assert sets["compiled"][0] == sets["usable"][0] == "portable"
    assert set(sets["usable"]) <= set(sets["compiled"]) and sets["used"] == sets["usable"][-1]
    assert "native" not in info["skipped"]
    json.dumps(info)


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not Linux")
def test_openmp_runtimes_are_found():
    if native.build_info()["openmp"]["built"]:
        assert native.openmp_runtimes()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("libgomp.so.1", True),
        ("libgomp-24e2ab19.so.1.0.0", True),
        ("libiomp5.so", True),
        ("libomp.so.5", True),
        ("libomptarget.so", False),
        ("libcomposite.so", False),
    ],
)
def test_openmp_runtimes_are_told_by_name(name, is_one):
    assert bool(native._OPENMP_RUNTIME.match(name)) is is_one


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_extension_links_neither_torch_nor_python():
    listing = subprocess.run(
        ["readelf", "-d", native.build_info()["native"]["path"]], text=True, capture_output=True, check=True
    ).stdout
    needed = [line.split("[")[1].rstrip("]") for line in listing.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if name.startswith(("libtorch", "libc10", "libpython", "libcu"))]
    assert "RUNPATH" not in listing and "RPATH" not in listing


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_function_is_shared_between_instruction_sets():
    """A weak symbol from a file compiled for AVX-512 could be linked into the portable code."""
    objects = [path for path in (ROOT / "build").rglob("*.o") if "keylock_" in path.relative_to(ROOT).as_posix()]
    if not objects:
        pytest.skip("the extension was built elsewhere")
    for path in objects:
        symbols = subprocess.run(["nm", str(path)], text=True, capture_output=True, check=True).stdout
        assert not [line for line in symbols.splitlines() if line.split()[-2] in ("W", "V", "u")], path
