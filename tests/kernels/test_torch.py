"""The ops behave under torch's own machinery: opcheck, compile, autocast, precision settings."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from keylock_kernels import (
    localized_attention,
    low_rank_linear,
    rank_one_coefficients,
    rank_one_linear,
    rank_one_update,
)
from keylock_kernels.ops.low_rank.updates import Updates
from keylock_kernels.testing import attention_inputs, cast, low_rank_inputs, rank_one_inputs
from tests.kernels.helpers import (
    ATTENTION_BACKENDS,
    ATTENTION_CASES,
    DEVICE,
    LINEAR_BACKENDS,
    LOW_RANK_CASES,
    RANK_ONE_CASES,
    UPDATE_BACKENDS,
    attention_case,
    low_rank_case,
    rank_one_case,
    run,
)

ATTENTION_ORDER = (
    "query", "key", "value", "scale", "key_bias", "query_regions", "key_regions", "image_key", "image_value",
    "image_lengths", "image_key_bias", "image_weights", "readout_tokens", "readout_weights",
)  # fmt: skip
OPS = {
    **{("linear", b): (rank_one_linear, rank_one_case("everything", dtype=torch.float32), b) for b in UPDATE_BACKENDS},
    **{
        ("adapters", b): (low_rank_linear, low_rank_case("everything", dtype=torch.float32), b) for b in LINEAR_BACKENDS
    },
    **{
        ("attention", b): (localized_attention, attention_case("everything", dtype=torch.float32), b)
        for b in ATTENTION_BACKENDS
    },
}
every_op = pytest.mark.parametrize("op", OPS, ids="-".join)


def rank_one_updates(inputs):
    x, u, slots = (inputs[name] for name in ("x", "u", "slots"))
    gate = (inputs.get(name) for name in ("beta", "tau", "strength"))
    return Updates(u, inputs["v"], None, slots, *gate, None, None, 1)


def low_rank_updates(inputs):
    tables = (inputs[name] for name in ("up", "down", "offsets", "slots"))
    return Updates(*tables, None, None, inputs.get("strength"), inputs.get("token_weights"), None, 17)


def opcheck_layer(inputs, updates, backend):
    layer = [inputs.get(name) for name in ("x", "weight", "bias", "output_scale")]
    arguments, how = (*layer, *updates[:-1]), (updates.max_rank, backend)
    torch.library.opcheck(torch.ops.keylock.low_rank_linear.default, (*arguments, *how))
    grad = torch.randn(*inputs["x"].shape[:2], inputs["weight"].shape[0])
    needs = [a is not None and a.is_floating_point() for a in arguments]
    torch.library.opcheck(torch.ops.keylock.low_rank_linear_backward.default, (grad, *arguments, *how, needs))


def opcheck_update(base, x, updates, backend):
    arguments, how = (x, *updates[:-1]), (updates.max_rank, backend)
    torch.library.opcheck(torch.ops.keylock.low_rank_update.default, (base, *arguments, *how))
    needs = [a is not None and a.is_floating_point() for a in arguments]
    torch.library.opcheck(torch.ops.keylock.low_rank_update_backward.default, (base, *arguments, *how, needs))


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("case", RANK_ONE_CASES)
def test_opcheck_accepts_rank_one_linear(case, backend):
    inputs = rank_one_case(case, dtype=torch.float32)
    opcheck_layer(inputs, rank_one_updates(inputs), backend)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("case", LOW_RANK_CASES)
def test_opcheck_accepts_low_rank_linear(case, backend):
    inputs = low_rank_case(case, dtype=torch.float32)
    opcheck_layer(inputs, low_rank_updates(inputs), backend)


@pytest.mark.parametrize("backend", UPDATE_BACKENDS)
def test_opcheck_accepts_coefficients_and_updates(backend):
    inputs = rank_one_case("everything", dtype=torch.float32)
    x, v, slots, u = (inputs[k] for k in ("x", "v", "slots", "u"))
    gate = [inputs[k] for k in ("beta", "tau", "strength")]
    c = rank_one_coefficients(x, v, slots)
    ops = torch.ops.keylock
    torch.library.opcheck(ops.rank_one_coefficients.default, (x, v, slots, *gate))
    needs = [True, True, False, True, True, True]
    torch.library.opcheck(ops.rank_one_coefficients_backward.default, (c, x, v, slots, *gate, needs))
    opcheck_update(torch.randn(3, 7, 11), None, Updates(u, None, None, slots, *[None] * 4, c, 1), backend)
    inputs = low_rank_case("everything", dtype=torch.float32)
    opcheck_update(torch.randn(4, 7, 11), inputs["x"], low_rank_updates(inputs), backend)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_opcheck_accepts_localized_attention(case, backend):
    inputs = {"scale": 0.3, "image_lengths": [], **attention_case(case, dtype=torch.float32)}
    arguments = [inputs.get(name) for name in ATTENTION_ORDER]
    arguments[9] = list(arguments[9])
    out, readout = torch.ops.keylock.localized_attention.default(*arguments, backend)
    torch.library.opcheck(torch.ops.keylock.localized_attention.default, (*arguments, backend))
    needs = [isinstance(arguments[p], torch.Tensor) for p in (0, 1, 2, 4, 7, 8, 10, 11, 13)]
    grads = (torch.randn_like(out), torch.randn_like(readout))
    torch.library.opcheck(torch.ops.keylock.localized_attention_backward.default, (*grads, *arguments, backend, needs))


@every_op
def test_one_compiled_graph_serves_every_shape(op):
    function, _, backend = OPS[op]
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    sizes = ((6, 13), (8, 17), (10, 19))  # equal sizes of unrelated dimensions would be compiled as one
    if op[0] == "linear":
        batches = [rank_one_inputs(b, t, 9, 11, 4, 3, dtype=torch.float32) for b, t in sizes]
    elif op[0] == "adapters":
        batches = [low_rank_inputs(b, t, 9, 11, (3, 0, 5, 2), 3, dtype=torch.float32) for b, t in sizes]
    else:
        options = ATTENTION_CASES["everything"]
        batches = [attention_inputs(b, n, 7, 2, 5, dtype=torch.float32, **options) for b, n in sizes]
    for each in batches:
        results, grads = run(compiled, each, backend=backend)
        wanted, wanted_grads = run(function, each, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
        assert all(torch.equal(grads[name], wanted_grads[name]) for name in wanted_grads)
    assert graphs.frame_count == 1
    torch._dynamo.reset()


@every_op
def test_a_checkpointed_block_has_the_gradients_of_one_that_is_not(op):
    function, inputs, backend = OPS[op]
    results, grads = run(
        lambda **given: checkpoint(lambda: function(**given), use_reentrant=False), inputs, backend=backend
    )
    wanted, wanted_grads = run(function, inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    assert all(torch.equal(grads[name], wanted_grads[name]) for name in wanted_grads)


def test_auto_and_the_pieces_compile_too():
    inputs = rank_one_case("everything", dtype=torch.float32)
    attention = attention_case("everything", dtype=torch.float32)

    def both():
        c = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"])
        return rank_one_update(inputs["x"], inputs["v"], inputs["slots"], c), localized_attention(**attention)[0]

    for result, wanted in zip(torch.compile(both, fullgraph=True, backend="eager")(), both(), strict=True):
        assert torch.equal(result, wanted)
    torch._dynamo.reset()


@every_op
def test_a_second_derivative_is_refused(op):
    function, inputs, backend = OPS[op]
    name = "query" if op[0] == "attention" else "x"
    leaf = inputs[name].clone().requires_grad_()
    result = function(**{**inputs, name: leaf}, backend=backend)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(
            sum(r.sum() for r in result) if op[0] == "attention" else result.sum(), leaf, create_graph=True
        )


@every_op
def test_no_gradient_is_recorded_where_none_is_wanted(op):
    function, inputs, backend = OPS[op]
    name = "query" if op[0] == "attention" else "x"
    with torch.no_grad():
        result = function(**{**inputs, name: inputs[name].clone().requires_grad_()}, backend=backend)
    assert not (result[0] if op[0] == "attention" else result).requires_grad


@every_op
def test_inference_mode_gives_the_same_bits(op):
    function, inputs, backend = OPS[op]
    wanted = function(**inputs, backend=backend)
    with torch.inference_mode():
        result = function(
            **{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, backend=backend
        )
    pairs = zip(result, wanted, strict=True) if op[0] == "attention" else [(result, wanted)]
    assert all(torch.equal(a, b) for a, b in pairs)


@every_op
def test_autocast_casts_activations_and_leaves_routing_alone(op):
    function, inputs, backend = OPS[op]
    cast_names = ("x", "weight", "bias", "query", "key", "value", "image_key", "image_value")
    by_hand = {k: v.bfloat16() if k in cast_names else v for k, v in inputs.items()}
    wanted, wanted_grads = run(function, by_hand, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        results, grads = run(function, inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    assert results[0].dtype == torch.bfloat16
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, wanted_grads[name].float()), name


@every_op
def test_meta_tensors_give_the_results_shapes(op):
    function, inputs, backend = OPS[op]
    wanted = function(**inputs, backend=backend)
    result = function(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    for actual, expected in zip(result, wanted, strict=True) if op[0] == "attention" else [(result, wanted)]:
        assert actual.device.type == "meta"
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)


@every_op
def test_autocast_leaves_float64_alone(op):
    function, inputs, backend = OPS[op]
    with torch.autocast(DEVICE, torch.bfloat16):
        result = function(**cast(inputs, torch.float64), backend=backend)
    assert (result[0] if op[0] == "attention" else result).dtype == torch.float64


def test_coefficients_are_not_autocast():
    inputs = rank_one_case("linear", dtype=torch.float32)
    wanted = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"]), wanted)


@every_op
def test_float32_products_ignore_a_lower_matmul_precision(op):
    function, inputs, backend = OPS[op]
    wanted, wanted_grads = run(function, inputs, backend=backend)
    torch.set_float32_matmul_precision("medium")
    try:
        results, grads = run(function, inputs, backend=backend)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    assert all(torch.equal(grads[name], wanted_grads[name]) for name in wanted_grads)


def test_precision_set_per_backend_is_ignored_and_put_back():
    function, inputs, _ = OPS["linear", UPDATE_BACKENDS[0]]
    backend = "eager"
    wanted = function(**inputs, backend=backend)
    holders = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [holder.fp32_precision for holder in holders]
    try:
        for holder in holders:
            holder.fp32_precision = "tf32"
        assert torch.equal(function(**inputs, backend=backend), wanted)
        assert [holder.fp32_precision for holder in holders] == ["tf32", "tf32"]
    finally:
        for holder, precision in zip(holders, before, strict=True):
            holder.fp32_precision = precision


@every_op
def test_unfilled_memory_is_never_read(op, poisoned_memory):
    function, inputs, backend = OPS[op]
    results, grads = run(function, inputs, backend=backend)
    assert all(t.isfinite().all() for t in [*results, *grads.values()])


def test_tensors_of_more_than_two_to_the_31_elements_keep_their_offsets():
    """A view that strides over 2^31 elements of one allocation, untouched pages costing nothing."""
    rows, step = 2, 2**31 + 64
    memory = torch.empty(step + 64, dtype=torch.bfloat16)
    x = memory.as_strided((rows, 1, 8), (step, 8, 1))
    x.copy_(torch.arange(16).view(2, 1, 8))
    slots = torch.tensor([[0], [1]], dtype=torch.int32)
    u = torch.ones(2, 8, dtype=torch.bfloat16)
    c = torch.ones(2, 1, 1)
    for backend in UPDATE_BACKENDS:
        assert torch.equal(rank_one_update(x, u, slots, c, backend=backend), x.contiguous() + 1)
    query = x[:, :, None]
    for backend in ATTENTION_BACKENDS:
        out = localized_attention(query, query, query, backend=backend)
        assert torch.equal(out, query.contiguous())
