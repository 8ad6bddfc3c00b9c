"""The C++ kernels of the whole rank-one layer and of the update's gradients, in every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_kernels import native
from keylock_kernels.ops.rank_one import native as rank_one
from keylock_kernels.ops.rank_one import reference

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native: {native.unavailable_reason()}")

INSTRUCTION_SETS = native.instruction_sets()
HALVES = (torch.float16, torch.bfloat16)


def make(rows, tokens, depth, outputs, rank, seed=0, count=5):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, tokens, depth, generator=g),
        torch.randn(outputs, depth, generator=g) / max(depth, 1) ** 0.5,
        torch.randn(outputs, generator=g),
        torch.randn(count, outputs, generator=g),
        torch.randint(-1, count, (rows, rank), generator=g, dtype=torch.int32),
        torch.randn(rows, tokens, rank, generator=g),
    )


def layer(x, weight, bias, u, slots, coefficients):
    wide = [None if t is None else t.double() for t in (x, weight, bias, u, coefficients)]
    return reference.linear(wide[0], wide[1], wide[3], slots, wide[2], wide[4])


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, *HALVES]),
    u_dtype=st.sampled_from([torch.float64, torch.float32, *HALVES]),
    rows=st.integers(0, 3),
    tokens=st.sampled_from([0, 1, 5, 511, 512, 513, 1030]),
    outputs=st.sampled_from([1, 7, 16, 127, 128, 129, 300]),
    rank=st.sampled_from([0, 1, 2, 17]),
    name=st.sampled_from(INSTRUCTION_SETS),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_updates_gradients_match_float64(dtype, u_dtype, rows, tokens, outputs, rank, name, seed):
    _, _, _, u, slots, coefficients = make(rows, tokens, 1, outputs, rank, seed)
    grad = torch.randn(rows, tokens, outputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    u = u.to(u_dtype)
    grad_u, grad_c = rank_one.rank_one_update_backward(grad, u, slots, coefficients, instruction_set=name)
    exact = reference.added_backward(grad.double(), u.double(), slots, coefficients.double(), True, True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert grad_u.dtype == grad_c.dtype == wide
    eps = torch.finfo(wide).eps
    for ours, true, terms in ((grad_u, exact[0], rows * tokens * rank), (grad_c, exact[1], outputs)):
        if true.numel():
            assert (ours.double() - true).abs().max() <= eps * (4 + terms**0.5) * (10 + true.abs().max())
    alone = rank_one.rank_one_update_backward(grad, u, slots, coefficients, False, True, instruction_set=name)
    assert alone[0] is None and torch.equal(alone[1], grad_c)
    alone = rank_one.rank_one_update_backward(grad, u, slots, coefficients, True, False, instruction_set=name)
    assert alone[1] is None and torch.equal(alone[0], grad_u)


def taking(dtype):
    """The instruction sets in which the layer has a product of its own."""
    wanted = ("avx512_bf16",) if dtype == torch.bfloat16 else ("avx512", "avx512_bf16")
    return [name for name in INSTRUCTION_SETS if name in wanted]


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.integers(0, 3),
    tokens=st.sampled_from([0, 1, 3, 4, 77, 191, 193, 400]),
    depth=st.sampled_from([0, 2, 30, 32, 34, 320, 322, 700]),
    outputs=st.sampled_from([1, 15, 16, 17, 96, 97, 320, 333]),
    rank=st.sampled_from([0, 1, 17]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_layer_rounds_once(dtype, rows, tokens, depth, outputs, rank, has_bias, seed):
    x, weight, bias, u, slots, coefficients = make(rows, tokens, depth, outputs, rank, seed)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = bias if has_bias else None
    exact = layer(x, weight, bias, u, slots, coefficients)
    terms = layer(x.abs(), weight.abs(), None if bias is None else bias.abs(), u.abs(), slots, coefficients.abs())
    for name in taking(dtype):
        with pytest.MonkeyPatch.context() as patch:
            chosen = native.instruction_set("rank_one_linear", name)
            patch.setattr(native, "instruction_set", lambda op, name, chosen=chosen: chosen)
            assert rank_one.multiplies(x)
            y = rank_one.rank_one_linear(x, weight, bias, u, slots, coefficients)
        assert y.dtype == dtype and y.shape == exact.shape
        allowed = torch.finfo(torch.float32).eps * (4 + depth**0.5) * terms + torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_the_layer_has_the_same_bits_wherever_it_stands(dtype):
    if not taking(dtype):
        pytest.skip("this CPU has no AVX-512 for this dtype")
    x, weight, bias, u, slots, coefficients = make(4, 77, 320, 333, 3)
    x, weight = x.to(dtype), weight.to(dtype)
    clean = rank_one.rank_one_linear(x, weight, bias, u, slots, coefficients)
    order = torch.tensor([2, 1, 3, 0])
    moved = rank_one.rank_one_linear(x[order], weight, bias, u, slots[order], coefficients[order])
    assert torch.equal(moved, clean[order])
    dirty, broken = x.clone(), coefficients.clone()
    dirty[1], broken[1] = torch.nan, torch.inf
    others = [0, 2, 3]
    assert torch.equal(rank_one.rank_one_linear(dirty, weight, bias, u, slots, broken)[others], clean[others])
    alone = rank_one.rank_one_linear(x[:1], weight, bias, u, slots[:1], coefficients[:1])
    assert torch.equal(alone, clean[:1])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(rank_one.rank_one_linear(x, weight, bias, u, slots, coefficients), clean)
    finally:
        torch.set_num_threads(before)


def test_any_stride_of_the_layers_inputs_will_do():
    x, weight, bias, u, slots, coefficients = make(2, 20, 64, 48, 3)
    if not rank_one.multiplies(x):
        pytest.skip("this CPU has no AVX-512")
    clean = rank_one.rank_one_linear(x, weight, bias, u, slots, coefficients)
    other = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        weight.T.contiguous().T,
        torch.stack([bias, bias], 1)[:, 0],
        torch.nn.functional.pad(u, (1, 2))[:, 1:-2],
        slots.T.contiguous().T,
        coefficients.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    assert torch.equal(rank_one.rank_one_linear(*other), clean)
    odd = torch.nn.functional.pad(x, (0, 1)).bfloat16()[:1, :1, :64]  # counts as contiguous, its strides odd
    if rank_one.multiplies(odd):
        arguments = (weight.bfloat16(), bias, u, slots[:1], coefficients[:1, :1])
        assert torch.equal(rank_one.rank_one_linear(odd, *arguments), rank_one.rank_one_linear(odd.clone(), *arguments))


def test_the_layer_refuses_a_slot_that_does_not_exist_and_foreign_tensors():
    x, weight, bias, u, slots, coefficients = make(2, 4, 8, 8, 3)
    if not rank_one.multiplies(x):
        pytest.skip("this CPU has no AVX-512")
    slots[1, 2] = 5
    with pytest.raises(ValueError, match=r"rank_one_linear: slots must lie in \[-1, 5\), got 5"):
        rank_one.rank_one_linear(x, weight, bias, u, slots, coefficients)
    with pytest.raises(ValueError, match="rank_one_linear: the native kernels read CPU tensors, got one on meta"):
        rank_one.rank_one_linear(x.to("meta"), weight, bias, u, slots, coefficients)
