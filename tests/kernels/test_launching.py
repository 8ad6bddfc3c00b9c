"""What is launched, and what not inside a CUDA graph capture; no GPU is needed: kernels are stand-ins, or not run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from keylock_kernels.ops import launching  # noqa: E402
from keylock_kernels.ops.localized_attention import triton_plan  # noqa: E402
from keylock_kernels.ops.low_rank import triton as low_rank  # noqa: E402
from keylock_kernels.ops.low_rank.updates import Updates  # noqa: E402

GPU = torch.device("cuda", 0)
FUSED = {"enable_fp_fusion": True}
MANY = 70_000  # more than CUDA's 65,535 in the second and third dimension of a grid


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
    assert kernel.asked == [(("x",), (2, 1), {"BM": 64, **FUSED})] and not kernel.launched


def test_a_kernel_that_is_loaded_is_captured(capturing):
    kernel = Kernel(module=1)
    launching.launch(kernel, (2, 1), GPU, "x", BM=64)
    assert kernel.launched == [(("x",), (2, 1), {"BM": 64, **FUSED})]


def test_outside_a_capture_nothing_is_asked(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = Kernel(module=None)
    launching.launch(kernel, (1,), GPU)
    assert len(kernel.launched) == 1 and not kernel.asked


def test_an_empty_grid_launches_nothing(capturing):
    kernel = Kernel(module=None)
    launching.launch(kernel, (3, 0), GPU)
    assert not kernel.launched and not kernel.asked


def many(*shape):
    """A tensor of that shape of which one element is stored."""
    return torch.zeros(1).expand(shape)


def low_rank_calls(updates):
    """Every launcher of the low-rank kernels, forward and backward, on two rows and tables of so many updates."""
    rows, tokens, outputs = 2, 1, 8
    slots = torch.zeros(rows, 1, dtype=torch.int32)
    x, tables = many(rows, tokens, 8), (many(updates, outputs), many(updates, 8))
    grad, weight = many(rows, tokens, outputs), torch.zeros(outputs, 8)
    gate = [torch.ones(updates)] * 2
    for offsets in (None, torch.tensor([0, 1, updates], dtype=torch.int32)):
        of = Updates(
            *tables, offsets, slots, *(gate if offsets is None else (None, None)), many(rows, 1), None, None, 1
        )
        names = ("x", "up", "down", "coefficients", "strength", *(("beta", "tau") if offsets is None else ()))
        needs = dict.fromkeys(("beta", "tau", "token_weights", *names), False) | dict.fromkeys(names, True)
        yield lambda of=of: low_rank.linear(x, weight, None, None, of)
        yield lambda of=of, needs=needs: low_rank.linear_backward(grad, x, weight, of, needs)
        if offsets is not None:
            yield lambda of=of: low_rank.update(grad, x, of)
            yield lambda of=of, needs=needs: low_rank.update_backward(grad, x, of, needs)
    given = Updates(tables[0], None, None, slots, *[None] * 4, many(rows, tokens, 1), 1)
    yield lambda: low_rank.update(grad, None, given)
    yield lambda: low_rank.update_backward(grad, None, given, dict.fromkeys(needs, False) | {"coefficients": True})


def test_tables_have_any_number_of_updates():
    grids = {}

    def note(kernel, grid, args, options):
        grids.setdefault(kernel.fn.__name__, []).append(grid)
        return True

    with launching.observed(note):
        for call in low_rank_calls(MANY):
            call()
    assert all(size <= 65_535 for each in grids.values() for grid in each for size in grid[1:])
    assert len(grids) == 7 and all(grid[0] == MANY for grid in grids["table_sum_kernel"])


@pytest.mark.parametrize("table", ["FORWARD", "BACKWARD", "KEYS"])
def test_gpus_with_little_shared_memory_take_no_table_of_those_with_much(table):
    """sm_86, sm_89 and sm_120 give a block 99 KiB; sm_120's name begins as sm_100's does."""
    rules = getattr(triton_plan, table)
    asked = [
        (size, width, load) for size in (2, 4, 8) for width in (40, 48, 64, 80, 96, 128, 160, 256) for load in range(4)
    ]

    def of(where: str) -> list[object]:
        return [triton_plan.configuration(rules, where, *one) for one in asked]

    assert of("sm_120") == of("sm_121") == of("sm_89") == of("sm_86") == of("sm_80")
    assert of("sm_103") == of("sm_100") != of("sm_120")
