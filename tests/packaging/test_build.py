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


def test_summary_is_one_line(setup_py):
    line = setup_py.summary(
        setup_py.Decision(True, "GNU 12.2.0; portable avx2; OpenMP 4.5"), setup_py.cuda_decision({})
    )
    assert line == (
        "keylock-kernels: native CPU kernels: yes (GNU 12.2.0; portable avx2; OpenMP 4.5); "
        "CUDA: skipped (this version contains no CUDA kernels)"
    )


def test_cuda_can_be_forbidden_but_not_had(setup_py):
    assert setup_py.cuda_decision({"KEYLOCK_BUILD_CUDA": "0"}) == (False, "KEYLOCK_BUILD_CUDA=0")
    with pytest.raises(setup_py.SetupError, match="KEYLOCK_BUILD_CUDA=1, but this version contains no CUDA kernels"):
        setup_py.cuda_decision({"KEYLOCK_BUILD_CUDA": "1"})


def test_native_can_be_forbidden(setup_py, tmp_path):
    decision = setup_py.native_decision({"KEYLOCK_BUILD_NATIVE": "0"}, tmp_path)
    assert decision == (False, "KEYLOCK_BUILD_NATIVE=0")


def test_native_that_cannot_be_built_is_skipped_or_an_error(setup_py, tmp_path, monkeypatch):
    def fail(*_):
        raise setup_py.BuildSkipped("the compiler failed: no such thing")

    monkeypatch.setattr(setup_py, "compile_native", fail)
    assert setup_py.native_decision({}, tmp_path) == (False, "the compiler failed: no such thing")
    with pytest.raises(setup_py.SetupError, match="KEYLOCK_BUILD_NATIVE=1, but the compiler failed: no such thing"):
        setup_py.native_decision({"KEYLOCK_BUILD_NATIVE": "1"}, tmp_path)


def test_max_jobs_reaches_the_compiler(setup_py, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(setup_py, "find_tool", lambda name, _: name)
    monkeypatch.setattr(setup_py, "run", lambda command, _: commands.append(command))
    monkeypatch.setattr(setup_py.shutil, "rmtree", lambda *_, **__: None)
    (tmp_path / "summary.txt").write_text("a compiler")
    assert setup_py.compile_native({"MAX_JOBS": "3"}, tmp_path) == "a compiler"
    assert commands[-1][-2:] == ["--parallel", "3"]


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
