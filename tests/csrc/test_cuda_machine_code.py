"""What the CUDA kernels in the installed module compiled to; no GPU is needed to read it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from keylock_kernels import native, native_cuda
from keylock_kernels.machine_code import CudaKernel, cuda_kernels

pytest.importorskip("triton")  # its wheel has the tools that read machine code
if native_cuda.missing() is not None and shutil.which("nvcc") is None:
    pytest.skip("nvcc is not installed, so there are no CUDA kernels", allow_module_level=True)

WIDTHS = {"Half": (16, 40, 64, 80, 128, 160, 256), "Bfloat": (16, 40, 64, 80, 128, 160, 256), "float": (64, 128, 256)}
TARGETS = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def kernels() -> list[CudaKernel]:
    assert native_cuda.missing() is None, native_cuda.missing()
    return cuda_kernels(Path(native.build_info()["native"]["path"]))


def described(kernel: CudaKernel) -> tuple[str, str, tuple[int, ...]]:
    """Which kernel, of which type, and its sizes, from its mangled name."""
    name = re.search(r"(Attention|Linear|Update)ForwardI(?:f|NS0_\d(Half|Bfloat)E)((?:Li\d+E)*)E", kernel.name)
    return name[1], name[2] or "float", tuple(map(int, re.findall(r"\d+", name[3])))


def test_every_kernel_is_there_for_every_architecture(kernels):
    built = native.build_info()["cuda"]["architectures"]
    targets = [name for name in built if name.startswith("sm_")]
    assert set(targets) == {kernel.target for kernel in kernels}
    for target in targets:
        found = sorted(described(kernel) for kernel in kernels if kernel.target == target)
        wanted = [("Attention", dtype, (width,)) for dtype, widths in WIDTHS.items() for width in widths]
        wanted += [("Linear", dtype, (80, 64, 1, 4)) for dtype in WIDTHS]
        wanted += [("Linear", dtype, (128, 128, 4, 2)) for dtype in ("Half", "Bfloat")]
        wanted += [("Update", dtype, ()) for dtype in WIDTHS]
        assert found == sorted(wanted), target


def test_the_default_architectures_are_all_built(kernels):
    if not set(TARGETS) <= {kernel.target for kernel in kernels}:
        pytest.skip("built for architectures of its own choice")
    assert "compute_100" in native.build_info()["cuda"]["architectures"]


def test_nothing_spills_and_nothing_has_a_stack(kernels):
    bad = [(k.name, k.target, k.stack) for k in kernels if k.stack or k.count(r"STL|LDL")]
    assert not bad


def test_halves_take_the_tensor_cores_and_floats_never_do(kernels):
    for kernel in kernels:
        what, dtype, _ = described(kernel)
        tensor_cores = kernel.count(r"HMMA")
        if what == "Update":
            continue
        if dtype == "float":
            assert tensor_cores == 0 and kernel.count(r"FFMA") > 100, kernel.name
        else:
            full = kernel.count(r"HMMA\.16816\.F32(\.BF16)?$")
            assert full == tensor_cores > 0, kernel.name
            assert kernel.count(r"LDSM\.16\.M88\.4$|LDSM\.16\.MT88\.4$") == kernel.count(r"LDSM") > 0, kernel.name


def test_queries_keys_values_and_outputs_move_in_128_bits(kernels):
    """Copies in the background have 16 bytes, all of them. What else there is reads numbers one by one: of masks,
    biases and slots, and of tensors that are not aligned (test_cuda_emulation.py counts that aligned ones never are).
    """
    for kernel in kernels:
        what, *_ = described(kernel)
        copies = kernel.count(r"LDGSTS")
        assert kernel.count(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128") == copies, kernel.name
        assert (copies >= 4) if what != "Update" else kernel.count(r"LDG\.E\.128") >= 4, kernel.name
        assert kernel.count(r"STG\.E\.128") >= 1, kernel.name
        assert kernel.count(r"(LDG|STG)\.E\.64") == 0, kernel.name


def test_blocks_are_large_enough_to_hide_latency(kernels):
    """Registers for at least eight warps on a multiprocessor, which has 65536."""
    for kernel in kernels:
        assert 8 * 32 * -(-kernel.registers // 8) * 8 <= 65536, kernel.name
