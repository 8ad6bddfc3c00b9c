"""On a GPU: the same promises, with nothing that waits for the device.

`make test-gpu` also runs the numeric tests of this folder there, on the Triton and the CUDA C++ kernels.
"""

from __future__ import annotations

import pytest
import torch

from keylock_kernels import localized_attention, rank_one_coefficients, rank_one_linear, rank_one_update
from keylock_kernels.testing import SHAPES, assert_as_accurate_as_eager, attention_inputs, cast, rank_one_inputs
from tests.kernels.helpers import ATTENTION_CASES, GPU_BACKENDS, attention_roundings, layer_and_attention, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
backends = pytest.mark.parametrize("backend", ["sdpa", *GPU_BACKENDS])
kernels = pytest.mark.parametrize("backend", GPU_BACKENDS)


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_attention_errs_at_most_twice_what_eager_errs(shape, dtype, backend):
    pixels = min(shape.pixels, 1024)
    options = dict(images=(4,), regions=True, weights="pixel", read=40, sums=True)
    sizes = (2, pixels, shape.tokens, shape.heads, shape.head_dim)
    inputs = attention_inputs(*sizes, dtype=dtype, device="cuda", **options)
    exact, exact_grads = run(localized_attention, cast(inputs, torch.float64), backend="eager")
    eager, eager_grads = run(localized_attention, inputs, backend="eager")
    actual, grads = run(localized_attention, inputs, backend=backend)
    loose = attention_roundings(backend, dtype)
    for index in range(2):
        assert_as_accurate_as_eager(actual[index], eager[index], exact[index], roundings=loose)
    for name, grad in grads.items():
        assert_as_accurate_as_eager(grad, eager_grads[name], exact_grads[name], name, roundings=loose)


@kernels
@dtypes
@pytest.mark.parametrize("tokens", [77, 1024])
def test_layers_err_at_most_twice_what_eager_errs(tokens, dtype, backend):
    inputs = rank_one_inputs(4, tokens, 768, 320, 6, 3, dtype=dtype, device="cuda")
    exact, exact_grads = run(rank_one_linear, cast(inputs, torch.float64), backend="eager")
    eager, eager_grads = run(rank_one_linear, inputs, backend="eager")
    actual, grads = run(rank_one_linear, inputs, backend=backend)
    assert_as_accurate_as_eager(actual[0], eager[0], exact[0])
    for name, grad in grads.items():
        assert_as_accurate_as_eager(grad, eager_grads[name], exact_grads[name], name)


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_on_the_gpu_is_attention_on_the_cpu(case):
    inputs = attention_inputs(3, 13, 7, 2, 5, device="cpu", **ATTENTION_CASES[case])
    wanted, wanted_grads = run(localized_attention, inputs, backend="eager")
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for backend in ("eager", "sdpa", "triton"):
        results, grads = run(localized_attention, moved, backend=backend)
        torch.testing.assert_close([r.cpu() for r in results], wanted)
        torch.testing.assert_close({k: g.cpu() for k, g in grads.items()}, wanted_grads)


@pytest.mark.parametrize("backend", ["eager", *GPU_BACKENDS])
def test_a_layer_repeats_every_bit_and_never_uses_tf32(backend):
    inputs = rank_one_inputs(4, 77, 768, 320, 3, 6, dtype=torch.float32, device="cuda")
    first, first_grads = run(rank_one_linear, inputs, backend=backend)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        second, second_grads = run(rank_one_linear, inputs, backend=backend)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


@kernels
def test_attention_repeats_every_bit(backend):
    options = dict(images=(4, 4), bias=True, regions=True, weights="pixel", read=4, sums=True)
    inputs = attention_inputs(4, 4096, 77, 8, 40, dtype=torch.bfloat16, device="cuda", **options)
    first, first_grads = run(localized_attention, inputs, backend=backend)
    second, second_grads = run(localized_attention, inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


@pytest.mark.parametrize("backend", ["eager", *GPU_BACKENDS])
def test_a_slot_or_token_that_does_not_exist_gives_nan_without_a_synchronisation(backend):
    inputs = rank_one_inputs(2, 3, 4, 5, 3, 1, gate=None, dtype=torch.float32, device="cuda")
    inputs["slots"] = torch.tensor([[0], [3]], dtype=torch.int32, device="cuda")
    attention = attention_inputs(2, 8, 5, 1, 8, dtype=torch.float32, device="cuda")
    tokens = torch.tensor([[0], [5]], dtype=torch.int32, device="cuda")

    def results():
        return (
            rank_one_linear(**inputs, backend=backend),
            rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"]),
            localized_attention(**attention, readout_tokens=tokens, backend=backend)[1],
        )

    results()  # a kernel's first use compiles it and loads it
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result in found:
        assert result[0].isfinite().all() and result[1].isnan().all()


@kernels
def test_a_captured_graph_serves_other_inputs(backend):
    """Forward and backward of both ops in one graph: replayed, it gives what the ops give on what lies there now."""
    options = dict(images=(4, 4), weights="row", read=2)
    layers = [rank_one_inputs(2, 77, 64, 80, 4, 2, seed=s, dtype=torch.bfloat16, device="cuda") for s in (0, 1)]
    pictures = [
        attention_inputs(2, 256, 77, 2, 40, seed=s, dtype=torch.bfloat16, device="cuda", **options) for s in (0, 1)
    ]
    held, shown = (
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in x[0].items()} for x in (layers, pictures)
    )

    upstream = [torch.ones_like(r) for r in (rank_one_linear(**held), *localized_attention(**shown))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer_and_attention(held, shown, upstream, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer_and_attention(held, shown, upstream, backend)
    for target, source in ((held, layers[1]), (shown, pictures[1])):
        for name, tensor in target.items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(source[name])
    graph.replay()
    wanted = layer_and_attention(layers[1], pictures[1], upstream, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["triton"])
def test_a_kernel_first_met_inside_a_capture_is_refused_and_works_afterwards(backend):
    """With sizes and options that no other test has launched."""
    options = dict(gate="row", bias=False, dtype=torch.float16, device="cuda")
    inputs = rank_one_inputs(2, 5, 48, 33, 4, 2, **options)
    with pytest.raises(RuntimeError, match="call once what is captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            rank_one_linear(**inputs, backend=backend)
    assert torch.equal(rank_one_linear(**inputs, backend=backend), rank_one_linear(**inputs, backend=backend))


@kernels
def test_kernels_run_on_the_current_stream_and_the_tensors_own_device(backend):
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    inputs = rank_one_inputs(2, 77, 64, 80, 4, 2, dtype=torch.float32, device=device)
    stream = torch.cuda.Stream(device)
    c = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"])
    base = torch.zeros(2, 77, 80, device=device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        base.fill_(1)  # behind the pause: a kernel on another stream would not see it
        y = rank_one_update(base, inputs["u"], inputs["slots"], c, backend=backend)
    stream.synchronize()
    assert torch.equal(y, rank_one_update(base, inputs["u"], inputs["slots"], c, backend=backend))
