"""What setup.py decides, says and packs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSETS = "python/keylock_diffusers/assets"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".work", "build", "dist", "outputs", "*.egg-info", "*.so", "__pycache__"
)

pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("keylock_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(checkout: Path, hook: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a build hook as pip does without build isolation."""
    code = f"from setuptools import build_meta; build_meta.{hook}({str(checkout / 'dist')!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, **environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the checkout, without what building leaves behind."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    (copy / "keylock_kernels" / "_build.json").unlink(missing_ok=True)
    (copy / "dist").mkdir()
    # Files that packaging must find by pattern, not by name.
    for path in ("csrc/cuda/some_op.cu", f"{ASSETS}/some_model/unet/weights.safetensors"):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).touch()
    return copy


def files(checkout: Path, folder: str, pattern: str) -> set[str]:
    """Files below a folder of the checkout, as paths inside the checkout."""
    return {path.relative_to(checkout).as_posix() for path in (checkout / folder).rglob(pattern) if path.is_file()}


@pytest.fixture
def compiling(setup_py, monkeypatch):
    """What is compiled is recorded instead; fails where `fails` says so of its CUDA."""
    calls = []

    def fake(fails=lambda cuda: None):
        def compile_native(environ, scratch, cuda):
            calls.append(cuda)
            reason = fails(cuda)
            if reason is not None:
                raise setup_py.BuildSkipped(reason)
            return "a compiler"

        monkeypatch.setattr(setup_py, "compile_native", compile_native)
        monkeypatch.setattr(setup_py, "check_loads", lambda scratch: None)
        return calls

    return fake


@pytest.fixture
def nvcc(tmp_path) -> str:
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.touch(0o755)
    return str(path)


def test_summary_is_one_line(setup_py):
    native, cuda = setup_py.Decision(True, "GNU 12.2.0; portable"), setup_py.Decision(False, "nvcc is not installed")
    assert setup_py.summary(native, cuda) == (
        "keylock-kernels: native CPU kernels: yes (GNU 12.2.0; portable); CUDA: skipped (nvcc is not installed)"
    )


def test_cuda_is_built_where_nvcc_is(setup_py, tmp_path, compiling, nvcc):
    calls = compiling()
    folder = str(Path(nvcc).parent)
    for environ in ({"PATH": folder}, {"PATH": "", "CUDA_HOME": str(tmp_path)}, {"PATH": "", "CUDACXX": nvcc}):
        native, cuda, architectures = setup_py.decide(environ, tmp_path)
        assert native == (True, "a compiler")
        assert cuda == (True, f"{nvcc}; sm_80 sm_90 sm_100 compute_100")
        assert architectures == ["sm_80", "sm_90", "sm_100", "compute_100"]
        assert calls.pop() == (nvcc, "80-real;90-real;100") and not calls


def test_cuda_that_is_not_there_or_not_wanted_is_skipped_or_an_error(setup_py, tmp_path, compiling, nvcc):
    calls = compiling()
    here = {"PATH": str(Path(nvcc).parent)}
    for environ, reason in (
        ({"PATH": ""}, "nvcc is not installed"),
        ({**here, "CUDACXX": "no-such-nvcc"}, "no-such-nvcc is not installed"),
        ({**here, "KEYLOCK_BUILD_CUDA": "0"}, "KEYLOCK_BUILD_CUDA=0"),
        ({**here, "TORCH_CUDA_ARCH_LIST": "Hopper"}, "TORCH_CUDA_ARCH_LIST names 'Hopper'"),
        ({**here, "KEYLOCK_BUILD_NATIVE": "0"}, "KEYLOCK_BUILD_NATIVE=0"),
    ):
        native, cuda, architectures = setup_py.decide(environ, tmp_path)
        assert native.built is ("KEYLOCK_BUILD_NATIVE" not in environ)
        assert not cuda.built and cuda.reason.startswith(reason) and architectures == []
        assert not any(calls)
        if environ.get("KEYLOCK_BUILD_CUDA") != "0":
            with pytest.raises(setup_py.SetupError, match=f"KEYLOCK_BUILD_CUDA=1, but {reason}"):
                setup_py.decide({**environ, "KEYLOCK_BUILD_CUDA": "1"}, tmp_path)


def test_cuda_that_fails_leaves_the_rest(setup_py, tmp_path, compiling, nvcc):
    calls = compiling(lambda cuda: "the compiler failed: no room" if cuda else None)
    environ = {"PATH": str(Path(nvcc).parent)}
    native, cuda, architectures = setup_py.decide(environ, tmp_path)
    assert native == (True, "a compiler") and architectures == []
    assert cuda == (False, "the compiler failed: no room")
    assert [bool(cuda) for cuda in calls] == [True, False]
    with pytest.raises(setup_py.SetupError, match="KEYLOCK_BUILD_CUDA=1, but the compiler failed: no room"):
        setup_py.decide({**environ, "KEYLOCK_BUILD_CUDA": "1"}, tmp_path)


@pytest.mark.parametrize(
    ("environ", "cmake", "names"),
    [
        ({}, "80-real;90-real;100", ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ({"CUDAARCHS": "86-real;90a-virtual"}, "86-real;90a-virtual", ["sm_86", "compute_90a"]),
        (
            {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a 12.0+PTX"},
            "80-real;90a-real;120",
            "sm_80 sm_90a sm_120 compute_120".split(),
        ),
        ({"TORCH_CUDA_ARCH_LIST": "8.6", "CUDAARCHS": "90"}, "90", ["sm_90", "compute_90"]),
    ],
)
def test_architectures_are_those_asked_for(setup_py, environ, cmake, names):
    assert setup_py.cuda_architectures(environ) == cmake
    assert setup_py.architecture_names(cmake) == names


def test_nvcc_takes_no_more_memory_than_there_is(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.os, "cpu_count", lambda: 64)
    for gib, jobs in ((1, 1), (5, 2), (4000, 64)):
        text = f"MemTotal:  9 kB\nMemAvailable:   {gib << 20} kB\n"
        monkeypatch.setattr(setup_py.Path, "read_text", lambda self, text=text: text)
        assert setup_py.jobs_for_memory() == jobs


def test_native_can_be_forbidden(setup_py, tmp_path):
    native, *_ = setup_py.decide({"KEYLOCK_BUILD_NATIVE": "0"}, tmp_path)
    assert native == (False, "KEYLOCK_BUILD_NATIVE=0")


def test_native_that_cannot_be_built_is_skipped_or_an_error(setup_py, tmp_path, compiling):
    compiling(lambda cuda: "the compiler failed: no such thing")
    native, cuda, _ = setup_py.decide({"PATH": ""}, tmp_path)
    assert native == (False, "the compiler failed: no such thing") and not cuda.built
    with pytest.raises(setup_py.SetupError, match="KEYLOCK_BUILD_NATIVE=1, but the compiler failed: no such thing"):
        setup_py.decide({"PATH": "", "KEYLOCK_BUILD_NATIVE": "1"}, tmp_path)


@pytest.mark.parametrize("cuda", [None, ("nvcc", "90")], ids=["no CUDA", "CUDA"])
def test_max_jobs_reaches_the_compiler(setup_py, tmp_path, monkeypatch, cuda):
    commands = []
    monkeypatch.setattr(setup_py, "find_tool", lambda name, _: name)
    monkeypatch.setattr(setup_py, "run", lambda command, _: commands.append(command))
    monkeypatch.setattr(setup_py.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(setup_py, "jobs_for_memory", lambda: 7)
    (tmp_path / "summary.txt").write_text("a compiler")
    cuda = cuda and setup_py.Cuda(*cuda)
    assert setup_py.compile_native({"MAX_JOBS": "3"}, tmp_path, cuda) == "a compiler"
    assert commands[-1][-2:] == ["--parallel", "3"]
    assert f"-DKEYLOCK_CUDA_ARCHITECTURES={'90' if cuda else ''}" in commands[0]
    setup_py.compile_native({}, tmp_path, cuda)
    assert commands[-1][-2:] == (["--parallel", "7"] if cuda else ["--build", str(tmp_path)])


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "-- Detecting\nCMake Error at CMakeLists.txt:3 (project):\n  No CMAKE_CXX_COMPILER could be found.\n\nmore",
            "No CMAKE_CXX_COMPILER could be found.",
        ),
        ("CMake Error at a:1 (message):\n  Not the compiler:\n\n    /c++\n\n  more", "Not the compiler: /c++"),
        ("[1/2] x\na.cpp:1:2: error: expected ';'\n  1 | a", "a.cpp:1:2: error: expected ';'"),
        ("killed\n", "killed"),
        ("", "no output"),
    ],
)
def test_first_error_is_the_reason(setup_py, log, reason):
    assert setup_py.first_error(log) == reason


def test_wheel_without_a_compiler(checkout):
    missing = str(checkout / "no-such-compiler")
    result = build(checkout, "build_wheel", CXX=missing)
    assert result.returncode == 0, result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("keylock-kernels:")]
    assert line.startswith("keylock-kernels: native CPU kernels: skipped (CMake failed: ")
    assert missing in line

    (wheel,) = (checkout / "dist").glob("keylock_kernels-0*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = archive.read("keylock_kernels/_build.json").decode()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert missing in record
    assert "keylock = keylock_diffusers.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert {"keylock_kernels/py.typed", "keylock_diffusers/py.typed"} <= names
    assert files(checkout, "keylock_kernels", "*.py") <= names
    diffusers = files(checkout, "python/keylock_diffusers", "*.py") | files(checkout, ASSETS, "*")
    assert {name.removeprefix("python/") for name in diffusers} <= names
    assert not [name for name in names if name.startswith(("tests", "csrc", "python"))]


def test_wheel_that_must_have_native_fails_without_a_compiler(checkout):
    result = build(checkout, "build_wheel", CXX=str(checkout / "no-such-compiler"), KEYLOCK_BUILD_NATIVE="1")
    assert result.returncode != 0
    assert "KEYLOCK_BUILD_NATIVE=1, but CMake failed" in result.stdout


def test_sdist_holds_all_that_a_build_needs(checkout):
    expected = files(checkout, "csrc", "*") | files(checkout, ASSETS, "*")
    expected |= files(checkout, "keylock_kernels", "*.py") | files(checkout, "python/keylock_diffusers", "*.py")
    result = build(checkout, "build_sdist")
    assert result.returncode == 0, result.stdout
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert expected <= names
    assert {
        "keylock_kernels/py.typed",
        "python/keylock_diffusers/py.typed",
        "CMakeLists.txt",
        "LICENSE",
        "NOTICE",
        "setup.py",
        "pyproject.toml",
    } <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]
