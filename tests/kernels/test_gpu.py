"""On a GPU: the same promises, with nothing that waits for the device."""

from __future__ import annotations

import pytest
import torch

from keylock_kernels import localized_attention, rank_one_coefficients, rank_one_linear
from keylock_kernels.testing import SHAPES, assert_as_accurate_as_eager, attention_inputs, cast, rank_one_inputs
from tests.kernels.helpers import ATTENTION_CASES, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_sdpa_errs_at_most_twice_what_eager_errs(shape, dtype):
    pixels = min(shape.pixels, 1024)
    options = dict(images=(4,), regions=True, weights="pixel", read=2, sums=True)
    sizes = (2, pixels, shape.tokens, shape.heads, shape.head_dim)
    inputs = attention_inputs(*sizes, dtype=dtype, device="cuda", **options)
    exact, exact_grads = run(localized_attention, cast(inputs, torch.float64), backend="eager")
    eager, eager_grads = run(localized_attention, inputs, backend="eager")
    actual, grads = run(localized_attention, inputs, backend="sdpa")
    for index in range(2):
        assert_as_accurate_as_eager(actual[index], eager[index], exact[index])
    for name, grad in grads.items():
        assert_as_accurate_as_eager(grad, eager_grads[name], exact_grads[name], name)


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_on_the_gpu_is_attention_on_the_cpu(case):
    inputs = attention_inputs(3, 13, 7, 2, 5, **ATTENTION_CASES[case])
    wanted, wanted_grads = run(localized_attention, inputs, backend="eager")
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for backend in ("eager", "sdpa"):
        results, grads = run(localized_attention, moved, backend=backend)
        torch.testing.assert_close([r.cpu() for r in results], wanted)
        torch.testing.assert_close({k: g.cpu() for k, g in grads.items()}, wanted_grads)


def test_a_layer_repeats_every_bit_and_never_uses_tf32():
    inputs = rank_one_inputs(4, 77, 768, 320, 3, 6, dtype=torch.float32, device="cuda")
    first, first_grads = run(rank_one_linear, inputs)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        second, second_grads = run(rank_one_linear, inputs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


def test_a_slot_or_token_that_does_not_exist_gives_nan_without_a_synchronisation():
    inputs = rank_one_inputs(2, 3, 4, 5, 3, 1, gate=None, dtype=torch.float32, device="cuda")
    inputs["slots"] = torch.tensor([[0], [3]], dtype=torch.int32, device="cuda")
    attention = attention_inputs(2, 8, 5, 1, 8, dtype=torch.float32, device="cuda")
    tokens = torch.tensor([[0], [5]], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = rank_one_linear(**inputs)
        c = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"])
        _, maps = localized_attention(**attention, readout_tokens=tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result in (y, c, maps):
        assert result[0].isfinite().all() and result[1].isnan().all()
