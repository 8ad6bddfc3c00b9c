"""The C++ kernels of a whole layer with its updates, and of the updates' gradients, in every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_kernels import native
from keylock_kernels.ops.low_rank import native as low_rank
from keylock_kernels.ops.low_rank import reference
from keylock_kernels.ops.low_rank.updates import Updates
from keylock_kernels.testing import cast, low_rank_inputs

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native: {native.unavailable_reason()}")

INSTRUCTION_SETS = native.instruction_sets()
HALVES = (torch.float16, torch.bfloat16)


def updates_of(inputs, given=None):
    """The adapters of low_rank_inputs, or in their place a row of `up` each, with coefficients."""
    up, slots = inputs["up"], inputs["slots"]
    if given is not None:
        return Updates(up, None, None, slots, None, None, None, None, given, 1)
    more = inputs.get("strength"), inputs.get("token_weights")
    return Updates(up, inputs["down"], inputs["offsets"], slots, None, None, *more, None, len(up))


def layer(inputs, given=None, *, through=low_rank.low_rank_linear):
    arguments = (inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("output_scale"))
    return through(*arguments, updates_of(inputs, given))


def sizes(inputs):
    """The same with everything positive: what the terms of a sum add up to."""
    return {k: v.abs() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(rows, tokens, depth, outputs, ranks, taken, dtype, **options):
    inputs = low_rank_inputs(rows, tokens, depth, outputs, ranks, taken, dtype=torch.float32, **options)
    return {**inputs, "x": inputs["x"].to(dtype), "weight": inputs["weight"].to(dtype)}


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, *HALVES]),
    up_dtype=st.sampled_from([torch.float64, torch.float32, *HALVES]),
    rows=st.integers(0, 3),
    tokens=st.sampled_from([0, 1, 5, 511, 512, 513, 1030]),
    outputs=st.sampled_from([0, 1, 7, 16, 127, 128, 129, 300]),
    taken=st.sampled_from([0, 1, 2, 17]),
    name=st.sampled_from(INSTRUCTION_SETS),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_updates_gradients_match_float64(dtype, up_dtype, rows, tokens, outputs, taken, name, seed):
    inputs = make(rows, tokens, 1, outputs, (1,) * 5, taken, dtype, seed=seed)
    up, slots, c = inputs["up"].to(up_dtype), inputs["slots"], normal(rows, tokens, taken, seed=seed)
    grad = normal(rows, tokens, outputs, seed=seed + 1).to(dtype)
    grad_up, grad_c = low_rank.low_rank_backward(grad, up, slots, c, instruction_set=name)
    exact = reference.added_backward(grad.double(), up.double(), slots, c.double(), True, True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert grad_up.dtype == grad_c.dtype == wide
    eps = torch.finfo(wide).eps
    for ours, true, terms in ((grad_up, exact[0], rows * tokens * taken), (grad_c, exact[1], outputs)):
        if true.numel():
            assert (ours.double() - true).abs().max() <= eps * (4 + terms**0.5) * (10 + true.abs().max())
    alone = low_rank.low_rank_backward(grad, up, slots, c, False, True, instruction_set=name)
    assert alone[0] is None and torch.equal(alone[1], grad_c)
    alone = low_rank.low_rank_backward(grad, up, slots, c, True, False, instruction_set=name)
    assert alone[1] is None and torch.equal(alone[0], grad_up)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_coefficient_of_zero_gives_no_gradient_whatever_it_meets(bad, name):
    grad, up, c = normal(1, 9, 40), normal(2, 40), normal(1, 9, 2)
    slots = torch.tensor([[0, 1]], dtype=torch.int32)
    c[0, 4, 0] = grad[0, 4] = 0
    clean = low_rank.low_rank_backward(grad, up, slots, c, instruction_set=name)
    grad[0, 4] = bad
    grad_up, grad_c = low_rank.low_rank_backward(grad, up, slots, c, instruction_set=name)
    assert torch.equal(grad_up[0], clean[0][0]) and not grad_up[1].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(grad_c[0, others], clean[1][0, others])


def taking(dtype):
    """The instruction sets in which the layer has a product of its own."""
    wanted = ("avx512_bf16",) if dtype == torch.bfloat16 else ("avx512", "avx512_bf16")
    return [name for name in INSTRUCTION_SETS if name in wanted]


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    table=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.integers(0, 3),
    tokens=st.sampled_from([0, 1, 3, 4, 77, 191, 193, 400]),
    depth=st.sampled_from([0, 2, 30, 32, 34, 320, 322, 700]),
    outputs=st.sampled_from([0, 1, 15, 16, 17, 96, 97, 320, 333]),
    ranks=st.lists(st.sampled_from([0, 1, 4, 16, 17, 130]), max_size=3),
    taken=st.sampled_from([0, 1, 4]),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("bias", "strength", "weights", "scale")}),
    is_given=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_layer_rounds_once(dtype, table, rows, tokens, depth, outputs, ranks, taken, options, is_given, seed):
    ranks = (1,) * len(ranks) if is_given else tuple(ranks)
    inputs = make(rows, tokens, depth, outputs, ranks, taken, dtype, seed=seed, **options)
    inputs.update({name: inputs[name].to(table) for name in ("up", "down")})
    c = normal(rows, tokens, taken, seed=seed) if is_given else None
    wide = cast(inputs, torch.float64)
    exact = layer(wide, None if c is None else c.double(), through=reference.linear)
    terms = layer(sizes(wide), None if c is None else c.double().abs(), through=reference.linear)
    for name in taking(dtype):
        with pytest.MonkeyPatch.context() as patch:
            chosen = native.instruction_set("low_rank_linear", name)
            patch.setattr(native, "instruction_set", lambda op, name, chosen=chosen: chosen)
            y = layer(inputs, c)
        assert y.dtype == dtype and y.shape == exact.shape
        eps = torch.finfo(torch.float32).eps * (8 + 2 * depth**0.5 + (taken * max(ranks, default=0)) ** 0.5)
        assert ((y.double() - exact).abs() <= eps * terms + torch.finfo(dtype).eps / 2 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_given", [False, True])
def test_a_row_of_the_layer_has_the_same_bits_wherever_it_stands(dtype, is_given):
    if not taking(dtype):
        pytest.skip("this CPU has no AVX-512 for this dtype")
    ranks = (1,) * 4 if is_given else (3, 130, 0, 17)
    inputs = make(4, 77, 320, 333, ranks, 2, dtype)
    inputs["slots"] = torch.tensor([[0, 3], [1, 1], [2, -1], [3, 3]], dtype=torch.int32)
    if is_given:
        inputs["coefficients"] = normal(4, 77, 2)

    def run(of, order=slice(None)):
        names = ("x", "slots", "strength", "token_weights", "output_scale", "coefficients")
        rows = {name: of[name][order] for name in names if name in of}
        return layer({**of, **rows}, rows.get("coefficients"))

    clean = run(inputs)
    order = [2, 1, 3, 0]
    assert torch.equal(run(inputs, order), clean[order])
    dirty = {name: value.clone() for name, value in inputs.items()}
    dirty["x"][1], dirty["output_scale"][1] = torch.nan, torch.inf
    dirty["up"][1 if is_given else slice(3, 133)] = torch.nan  # which row 1 alone takes
    others = [0, 2, 3]
    assert torch.equal(run(dirty)[others], clean[others])
    assert torch.equal(run(inputs, [0]), clean[:1])  # without the row of far more updates
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(inputs), clean)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_larger_than_what_is_laid_out_at_a_time(dtype):
    if not taking(dtype):
        pytest.skip("this CPU has no AVX-512 for this dtype")
    inputs = make(2, 40, 1100, 4100, (8, 3), 1, dtype)
    exact = layer(cast(inputs, torch.float64), through=reference.linear)
    terms = layer(sizes(cast(inputs, torch.float64)), through=reference.linear)
    error = (layer(inputs).double() - exact).abs()
    assert (error <= 80 * torch.finfo(torch.float32).eps * terms + torch.finfo(dtype).eps / 2 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_stride_of_the_layers_inputs_will_do(dtype):
    if not taking(dtype):
        pytest.skip("this CPU has no AVX-512 for this dtype")
    inputs = make(2, 20, 64, 48, (3, 5), 2, dtype)
    clean = layer(inputs)
    other = {
        **inputs,
        "x": inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": inputs["weight"].T.contiguous().T,
        "bias": torch.stack([inputs["bias"]] * 2, 1)[:, 0],
        "output_scale": inputs["output_scale"].T.contiguous().T,
        "up": torch.nn.functional.pad(inputs["up"], (1, 2), value=torch.nan)[:, 1:-2],
        "down": inputs["down"].T.contiguous().T,
        "offsets": inputs["offsets"].repeat_interleave(2)[::2],
        "slots": inputs["slots"].T.contiguous().T,
        "strength": inputs["strength"].T.contiguous().T,
        "token_weights": inputs["token_weights"].mT.contiguous().mT,
    }
    assert torch.equal(layer(other), clean)
    c = normal(2, 20, 2)
    assert torch.equal(layer(inputs, c.permute(2, 0, 1).contiguous().permute(1, 2, 0)), layer(inputs, c))
    one = {**inputs, "x": torch.nn.functional.pad(inputs["x"], (0, 1))[:1, :1, :64]}  # contiguous, its strides odd
    one.update({name: inputs[name][:1] for name in ("slots", "strength", "output_scale")})
    one["token_weights"] = inputs["token_weights"][:1, :, :1]
    assert torch.equal(layer(one), layer({**one, "x": one["x"].clone()}))


def test_the_layer_refuses_what_does_not_exist_and_foreign_tensors():
    if not taking(torch.float32):
        pytest.skip("this CPU has no AVX-512")
    inputs = make(2, 4, 8, 8, (3, 2), 2, torch.float32)
    for name, value, message in (
        ("slots", [[0, 1], [2, 1]], r"slots must lie in \[-1, 2\), got 2"),
        ("offsets", [0, 6, 5], r"offsets must not decrease and lie in \[0, 5\], got \[0, 6, 5\]"),
    ):
        with pytest.raises(ValueError, match=f"low_rank_linear: {message}"):
            layer({**inputs, name: torch.tensor(value, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"rank_one_linear: slots must lie in \[-1, 5\), got 5"):
        layer({**inputs, "slots": torch.tensor([[0, 1], [5, 1]], dtype=torch.int32)}, torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match="low_rank_linear: the native kernels read CPU tensors, got one on meta"):
        layer({**inputs, "x": inputs["x"].to("meta")})
