"""The C++ kernels of localized_attention, in every instruction set this machine can run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_kernels import localized_attention, native
from keylock_kernels.ops.localized_attention import native as attention
from keylock_kernels.ops.precision import accumulate_dtype
from keylock_kernels.testing import attention_inputs, cast
from tests.kernels.helpers import run
from tests.kernels.test_localized_attention import judge, plain

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native: {native.unavailable_reason()}")

INSTRUCTION_SETS = native.instruction_sets()
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def check(inputs):
    """As accurate as eager; in float64, where nothing is more exact than eager, as good as equal to it."""
    if inputs["query"].dtype != torch.float64:
        return judge(inputs, "native")
    for actual, eager in zip(*(run(localized_attention, inputs, backend=b) for b in ("native", "eager")), strict=True):
        torch.testing.assert_close(actual, eager, rtol=1e-11, atol=1e-11)


def check_roughly(inputs):
    """No element is further off than eager's largest error, twice, and a rounding per pixel that is summed up.

    For shapes so small that there is no statistic: a single bias' gradient is the rest of what cancels.
    """
    exact, exact_grads = run(plain, cast(inputs, torch.float64))
    eager, eager_grads = run(plain, inputs)
    actual, grads = run(localized_attention, inputs, backend="native")
    for ours, theirs, true in zip(
        [*actual, *grads.values()], [*eager, *eager_grads.values()], [*exact, *exact_grads.values()], strict=True
    ):
        if true.numel() == 0:
            continue
        summed = torch.finfo(accumulate_dtype(ours.dtype)).eps * (64 + inputs["query"].shape[1])
        roundings = 4 * torch.finfo(ours.dtype).eps + summed
        allowed = 2 * (theirs.double() - true).abs().max() + roundings * true.abs().max().clamp(min=1)
        assert (ours.double() - true).abs().max() <= allowed


def taking(name):
    """Makes every call take one instruction set."""
    patch = pytest.MonkeyPatch()
    chosen = native.instruction_set("localized_attention", name)
    patch.setattr(native, "instruction_set", lambda op, name: chosen)
    return patch


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    patch = taking(request.param)
    yield request.param
    patch.undo()


@st.composite
def cases(draw):
    options = dict(
        images=tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 17, 40]), max_size=5))),
        bias=draw(st.booleans()),
        regions=draw(st.booleans()),
        weights=draw(st.sampled_from([None, "row", "pixel"])),
        read=draw(st.sampled_from([0, 1, 5, 40])),
        sums=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 2**31 - 1)),
    )
    # Around blocks of pixels, vectors of keys and of the head dimension; beyond one piece of pixels.
    pixels = draw(st.sampled_from([1, 15, 16, 17, 33, 257, 300]))
    tokens = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 77, 129]))
    head_dim = draw(st.sampled_from([1, 2, 7, 16, 17, 40, 64, 80, 130]))
    inputs = attention_inputs(draw(st.integers(1, 2)), pixels, tokens, draw(st.integers(1, 2)), head_dim, **options)
    if draw(st.booleans()):  # slices of something larger, as of one grouped projection
        for name in ("query", "key", "value", "image_key", "image_value"):
            if name in inputs:
                inputs[name] = F.pad(inputs[name], (3, 2))[..., 3 : 3 + head_dim]
    if draw(st.booleans()):  # heads before pixels, as diffusers lays them out
        for name in ("query", "key", "value"):
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    return inputs, draw(st.sampled_from(INSTRUCTION_SETS))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_shape_stride_option_and_dtype(case):
    inputs, name = case
    patch = taking(name)
    try:
        check_roughly(inputs)
    finally:
        patch.undo()


@every_dtype
def test_the_models_shape_is_as_accurate_as_eager(instruction_set, dtype):
    everything = dict(images=(4, 4, 16), bias=True, regions=True, weights="pixel", read=40, sums=True)
    check(attention_inputs(2, 200, 77, 2, 64, dtype=dtype, **everything))
    check(attention_inputs(2, 200, 77, 2, 64, dtype=dtype))


@every_dtype
@pytest.mark.parametrize("pixels", [0, 1000])
def test_bits_do_not_depend_on_threads(instruction_set, dtype, pixels):
    everything = dict(images=(4, 20), bias=True, weights="row", read=3, sums=True)
    inputs = attention_inputs(2, pixels, 77, 3, 40, dtype=dtype, **everything)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = run(localized_attention, inputs, backend="native")
            results.append([*out, *grads.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_scores_and_large_biases_do_not_overflow(instruction_set):
    inputs = attention_inputs(1, 20, 17, 2, 16, dtype=torch.float32)
    inputs["query"] = inputs["query"] * 1e3
    inputs["key_bias"] = torch.linspace(-1e5, 1e5, 17)[None]
    judge(inputs, "native")


def test_what_is_not_finite_stays_so(instruction_set):
    inputs = attention_inputs(1, 20, 17, 1, 16, dtype=torch.float32)
    for value in (torch.nan, torch.inf, -torch.inf):
        query = inputs["query"].clone()
        query[0, 3, 0, 5] = value
        out = localized_attention(**{**inputs, "query": query}, backend="native")
        rest = torch.arange(20) != 3
        assert out[0, 3].isnan().all()
        assert torch.equal(out[:, rest], localized_attention(**inputs, backend="native")[:, rest])


def test_streams_that_share_a_vector_keep_their_own_softmax(instruction_set):
    # Scores that differ by 200 between streams: with a maximum in common all but one would vanish.
    inputs = attention_inputs(1, 5, 3, 1, 8, images=(4, 4, 3, 1, 2, 2), dtype=torch.float64)
    inputs["image_key_bias"] = torch.repeat_interleave(
        torch.arange(6, dtype=torch.float64) * 200, torch.tensor([4, 4, 3, 1, 2, 2])
    )[None]
    expected = localized_attention(**inputs, backend="eager")
    torch.testing.assert_close(localized_attention(**inputs, backend="native"), expected)


def described(inputs):
    names = (
        "query", "key", "value", "scale", "key_bias", "query_regions", "key_regions", "image_key", "image_value",
        "image_lengths", "image_key_bias", "image_weights", "readout_tokens", "readout_weights",
    )  # fmt: skip
    return attention._inputs(*(inputs.get(name, () if name == "image_lengths" else None) for name in names))


@pytest.mark.parametrize("wrong", ["key", "image_key", "image_lengths", "key_bias", "key_regions", "readout_tokens"])
def test_the_kernel_itself_refuses_what_does_not_fit_and_writes_nothing(wrong):
    inputs = attention_inputs(2, 5, 7, 2, 8, images=(3,), bias=True, regions=True, read=2, dtype=torch.float32)
    inputs |= {"scale": 1.0, "image_lengths": (4,) if wrong == "image_lengths" else (3,)}
    if wrong == "readout_tokens":
        inputs[wrong][1, 1] = 10
    elif wrong != "image_lengths":
        inputs[wrong] = inputs[wrong][:1]
    out, maps = torch.full((2, 5, 2, 8), 7.0), torch.full((2, 2, 5, 2), 7.0)
    extension = native.extension()
    status = extension.localized_attention(
        described(inputs),
        native.describe(out),
        native.describe(maps),
        instruction_set=extension.InstructionSet.portable,
        threads=1,
    )
    expected = "token_out_of_range" if wrong == "readout_tokens" else "shape_mismatch"
    assert status.name == expected
    assert (out == 7.0).all() and (maps == 7.0).all()


def test_a_tensor_elsewhere_is_refused():
    inputs = attention_inputs(1, 5, 7, 2, 8, dtype=torch.float32)
    inputs["key"] = inputs["key"].to("meta")
    with pytest.raises(ValueError, match="localized_attention: the native kernels read CPU tensors, got one on meta"):
        described({**inputs, "scale": 1.0})
