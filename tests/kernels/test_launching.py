"""A launch inside a CUDA graph capture; no GPU is needed, since the device and the kernel are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from keylock_kernels.ops import launching  # noqa: E402

GPU = torch.device("cuda", 0)


class Kernel:
    """Compiles to something that is loaded, or is not; counts its launches."""

    fn = SimpleNamespace(__name__="some_kernel")

    def __init__(self, module):
        self.module, self.launched, self.asked = module, [], []

    def warmup(self, *args, grid, **options):
        self.asked.append((args, grid, options))
        return SimpleNamespace(module=self.module)

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((args, grid, options))


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_kernel_that_would_be_loaded_inside_a_capture_is_refused(capturing):
    kernel = Kernel(module=None)
    with pytest.raises(RuntimeError, match="some_kernel has not been launched.*before capturing, call once"):
        launching.launch(kernel, (2, 1), GPU, "x", BM=64)
    assert kernel.asked == [(("x",), (2, 1), {"BM": 64})] and not kernel.launched


def test_a_kernel_that_is_loaded_is_captured(capturing):
    kernel = Kernel(module=1)
    launching.launch(kernel, (2, 1), GPU, "x", BM=64)
    assert kernel.launched == [(("x",), (2, 1), {"BM": 64})]


def test_outside_a_capture_nothing_is_asked(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = Kernel(module=None)
    launching.launch(kernel, (1,), GPU)
    assert len(kernel.launched) == 1 and not kernel.asked


def test_an_empty_grid_launches_nothing(capturing):
    kernel = Kernel(module=None)
    launching.launch(kernel, (3, 0), GPU)
    assert not kernel.launched and not kernel.asked
